"""The comparison of two engines (``bench/hybrid.py``) on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from bench.tables.numbers import format_number
from bench.tables.terminal import show_table


def show_engines(record: Mapping[str, Any]) -> None:
    """Print one row per engine."""
    cells = [
        {
            "engine": engine,
            "weights": found["storage"],
            "accept length [95%]": format_number(found["accept_length"], found["accept_length_ci"]),
            "tokens/s alone": format_number(found["autoregressive_tokens_per_s"]),
            "with the head": format_number(found["tokens_per_s"]),
            "speedup": format_number(found["speedup"]),
            "own parity": f"{found['parity']}/{record['data']['num_prompts']}",
        }
        for engine, found in record["engines"].items()
    ]
    show_table("Engines", pd.DataFrame(cells), ["engine", "weights"])
