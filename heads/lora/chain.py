"""Medusa's networks on a tape."""

from heads.chains import write_medusa as write_chain

__all__ = ["write_chain"]
