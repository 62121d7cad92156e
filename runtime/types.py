"""Types for annotations. ``Var`` is a Jittor array; naming it does not load Jittor."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jittor import Var
else:
    Var = Any

__all__ = ["Var"]
