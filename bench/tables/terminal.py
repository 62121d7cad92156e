"""What a command shows on a terminal: notes and progress on stderr, tables on stdout.

Commands import this module before they start Jittor: pandas warns if it is loaded after kernels have changed how the
processor rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line on stderr."""
    NOTES.print(text, markup=False)


def progress_bar() -> Progress:
    """A progress bar on stderr, shown on a terminal only. Its tasks have the field ``note``."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
    columns += TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=NOTES, disable=not sys.stderr.isatty())


def show_table(
    title: str, cells: pd.DataFrame, text: Collection[str] = (), style: Callable[[str, str], str] = lambda *cell: ""
) -> None:
    """Print a frame of strings as a table; into a file or a pipe at its full width, so that no cell is cut.

    text: columns of words, aligned left. style: (column, cell) -> a style of rich.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in cells.columns:
        table.add_column(Text(name), justify="left" if name in text else "right")
    for row in cells.itertuples(index=False, name=None):
        table.add_row(*(Text(cell, style=style(name, cell)) for name, cell in zip(cells.columns, row, strict=True)))
    full_width = None if sys.stdout.isatty() else 10_000  # columns; a table takes only what it needs
    Console(highlight=False, width=full_width).print(table)
