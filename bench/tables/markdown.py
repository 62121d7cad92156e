"""Markdown pages: tables, and the block between two markers that a command replaces."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd


def markdown_table(cells: pd.DataFrame, text: Collection[str] = ()) -> str:
    """A frame of strings as a table. text: columns of words, aligned left."""
    rule = "|".join(" --- " if name in text else " ---: " for name in cells.columns)
    return "\n".join([_line(cells.columns), f"|{rule}|", *map(_line, cells.itertuples(index=False, name=None))])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def language_of(path: str | Path) -> str:
    """``zh`` for a name ending in ``_zh.md``, else ``en``."""
    return "zh" if Path(path).name.endswith("_zh.md") else "en"


def replace_block(text: str, block: str, path: str | Path, begin: str, end: str) -> str:
    """``text`` with ``block`` between the markers, which stay. Raises ValueError unless each marker occurs once."""
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"{path}: expected the marker {marker} once, found it {text.count(marker)} times")
    before, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{path}: {end} comes before {begin}")
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
