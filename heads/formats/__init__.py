"""Draft heads in and out of other systems' formats and of single files, nothing lost and nothing guessed.

``weight_convert.py`` is the command. A format is an object with ``recognise``, ``read``, ``write`` and ``logits``:
those of this project are in ``own.py``, what those of other systems share in ``published.py``.
"""

from heads.formats.conversion import FORMATS, convert, recognise

__all__ = ["FORMATS", "convert", "recognise"]
