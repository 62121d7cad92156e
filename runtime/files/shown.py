"""A value as an error message shows it: short, on one line, whatever it holds."""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 80  # characters
MOST_BITS = 256  # of an integer that is written out; Python refuses to write very long ones


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 20
        self.maxstring = self.maxlong = self.maxother = MOST

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() <= MOST_BITS:
            return repr(value)
        return f"an integer of about {value.bit_length() * 3 // 10} digits"


_SHORT = _Short()


def shown(value: Any, most: int = MOST) -> str:
    """``repr`` of a value, cut to ``most`` characters without writing out what is cut.

    Worked example: shown("abcdef", 6) is 'ab... with the quotation mark, six characters.
    """
    text = repr(value[: most + 1]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
