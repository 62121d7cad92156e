"""The cells of a table of results, shared by the terminal's and the README's."""

from __future__ import annotations

import pandas as pd

from bench.tables.numbers import format_millions, format_number, format_percent
from decoding.options import GREEDY

PARITY_FAILED = "parity failed"
WORDS = ("head", "backbone", "device", "dtype", "data", "file")  # columns of words
# The header of each column, in English and in Chinese.
HEADERS = {
    "head": ("head", "草稿头"),
    "backbone": ("backbone", "主干模型"),
    "device": ("device", "设备"),
    "dtype": ("dtype", "精度"),
    "data": ("data", "数据"),
    "prompts": ("prompts", "提示数"),
    "nodes": ("nodes", "树节点数"),
    "seeds": ("seeds", "种子数"),
    "accept_length": ("accept length [95%]", "接受长度 [95%]"),
    "tokens_per_s": ("tokens/s", "tokens/s"),
    "speedup": ("speedup [95%]", "加速比 [95%]"),
    "overhead": ("overhead", "开销"),
    "draft_share": ("draft share", "草稿时间占比"),
    "ratio": ("ratio to {}", "与 {} 之比"),
    "parameters": ("parameters [M]", "参数量 [M]"),
    "train_s": ("train s", "训练秒数"),
    "draft_ms": ("draft ms", "草稿毫秒"),
    "parity": ("parity", "一致性"),
    "warning": ("warning", "警告"),
    "file": ("file", "文件"),
}


def header(language: str) -> dict[str, str]:
    """Column -> its header in ``en`` or ``zh``."""
    return {name: both[language == "zh"] for name, both in HEADERS.items()}


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
