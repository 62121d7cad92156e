"""The cells of a table of results, shared by the terminal's and the README's."""

from __future__ import annotations

import pandas as pd

from bench.tables.numbers import format_millions, format_number, format_percent
from decoding.options import GREEDY

PARITY_FAILED = "parity failed"


def summary_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The text of each figure, one row per result; columns named as in ``load_results``."""
    return pd.DataFrame(
        [
            {
                "backbone": row.backbone,
                "device": row.device,
                "dtype": row.dtype,
                "data": row.data,
                "prompts": str(row.prompts) if row.prompts == row.num_prompts else f"{row.prompts}/{row.num_prompts}",
                "nodes": str(row.nodes),
                "accept_length": format_number(row.accept_length, (row.accept_length_low, row.accept_length_high)),
                "tokens_per_s": format_number(row.tokens_per_s),
                "speedup": PARITY_FAILED
                if row.parity_failed
                else format_number(row.speedup, (row.speedup_low, row.speedup_high)),
                "overhead": format_number(row.overhead),
                "draft_share": format_percent(row.draft_share),
                "draft_ms": format_number(row.draft_ms),
                "parameters": format_millions(row.parameters),
                "train_s": format_number(row.train_s),
                "parity": row.parity,
            }
            for row in frame.itertuples()
        ],
        index=frame.index,
    )


def with_marks(name: str, *marks: str) -> str:
    """A head's name with what is special about its result."""
    marks = [mark for mark in marks if mark]
    return f"{name} ({', '.join(marks)})" if marks else name


def sampling_mark(acceptance: str) -> str:
    """How drafts were accepted, if not greedily."""
    return "" if acceptance == GREEDY else acceptance
