"""Comparisons with another engine on a terminal: ``bench/hybrid.py`` and ``bench/served.py``."""

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


def show_served(record: Mapping[str, Any]) -> None:
    """Print two rows per format, ours and vLLM's."""
    cells = []
    for each in record["served"]:
        found = each["agreement"]
        for side in ("ours", "vllm"):
            figures = each[side]
            cells.append({
                "checkpoint": each["checkpoint"] if side == "ours" else "",
                "format": each["format"] if side == "ours" else "",
                "side": side,
                "drafts": str(figures["drafts"]),
                "accepted by position": " ".join(map(str, figures["accepted"])),
                "accept length": format_number(figures["accept_length"]),
                "tokens/s": format_number(figures["tokens_per_s"]),
                "same texts": f"{found['same_texts']}/{found['texts']}",
                "same passes": f"{found['same_passes']}/{found['passes']}",
            })  # fmt: skip
    show_table("Served", pd.DataFrame(cells), ["checkpoint", "format", "side"])
