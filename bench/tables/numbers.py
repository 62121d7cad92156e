"""How numbers are written: for people with three significant figures, for JSON as plain Python values."""

from __future__ import annotations

from typing import Any

import pandas as pd

from runtime.records import Interval


def format_number(value: float | None, interval: Interval | None = None) -> str:
    """``2.31 [2.25, 2.37]``, three significant figures at least; ``-`` for unknown."""
    if pd.isna(value):
        return "-"
    text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
    if interval is None or pd.isna(interval[0]):
        return text
    return f"{text} [{format_number(interval[0])}, {format_number(interval[1])}]"


def format_millions(count: float | None) -> str:
    """``4.46``, in millions; ``-`` for unknown."""
    return "-" if pd.isna(count) else "0" if count == 0 else format_number(count / 1e6)


def format_percent(share: float | None) -> str:
    """``25.0%``; ``-`` for unknown."""
    return "-" if pd.isna(share) else f"{100 * share:.1f}%"


def plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as JSON holds them: Python values, None for unknown."""
    return [
        {name: _plain(value) for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False, name=None)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        return value
    return None if pd.isna(value) else value.item() if hasattr(value, "item") else value
