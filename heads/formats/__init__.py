"""Heads in other systems' formats and in single files, read and written; the door is conversion.py."""

from heads.formats.conversion import FORMATS, convert, recognize

__all__ = ["FORMATS", "convert", "recognize"]
