"""Results side by side: reading several files, one summary line each, and what keeps them from being comparable.

Shared by ``bench/compare.py``, ``bench/report.py`` and ``bench/seeds.py``, so that a table in a terminal and a table in
a README can never disagree.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure.rules import GREEDY, describe
from bench.record.metrics import PairedRatio, paired_ratio
from bench.record.schema import Interval, OtherKindError, Record, read_record

AUTOREGRESSIVE = "autoregressive"
# column -> whether the best value is the largest; None: text, sorted by alphabet
SORT_COLUMNS: dict[str, bool | None] = {
    "head": None,
    "backbone": None,
    "device": None,
    "dtype": None,
    "data": None,
    "nodes": True,
    "prompts": True,
    "accept_length": True,
    "tokens_per_s": True,
    "speedup": True,
    "overhead": False,
    "draft_share": False,
    "draft_ms": False,
    "parameters": False,
    "train_s": False,
    "parity": None,
}


@dataclass(frozen=True)
class Result:
    """A record and where it came from. label: the head's name, with the file's name when heads repeat."""

    path: str
    label: str
    record: Record


@dataclass(frozen=True)
class Summary:
    """One line of a comparison. None is unknown; speedup and its interval are None too when parity failed.

    backbone: the last part of its path; data: the last two parts of the prompt file's path. prompts: rows kept,
    of num_prompts asked. draft_share: drafting seconds over decoding seconds. draft_ms: milliseconds of drafting per
    decoding pass. parameters: of the head. train_s: seconds until the kept checkpoint. parity: ``identical/prompts``,
    ``not checked``, or ``not applicable`` where texts are drawn. adapted: the head decoded with a backbone of its own
    making. greedy_agreement, token_agreement: of its text with the original's; both None where the backbone is as it
    was and where texts are drawn. acceptance: how drafts were accepted, in words. total_variation: mean distance of a
    token's choice from a draw; None for rules that are exact.
    """

    label: str
    path: str
    head: str
    backbone: str
    device: str
    dtype: str
    data: str
    nodes: int
    prompts: int
    num_prompts: int
    accept_length: float | None
    accept_length_ci: Interval | None
    tokens_per_s: float | None
    speedup: float | None
    speedup_ci: Interval | None
    overhead: float | None
    draft_share: float | None
    draft_ms: float | None
    parameters: int | None
    train_s: float | None
    parity: str
    parity_failed: bool
    interrupted: bool
    greedy_agreement: float | None
    token_agreement: float | None
    adapted: bool
    acceptance: str
    total_variation: float | None

    @property
    def drawn(self) -> list[str]:
        """What a table says beside the head's name when its texts are drawn."""
        return [] if self.acceptance == GREEDY else [self.acceptance]


@dataclass(frozen=True)
class HeadToHead:
    """``label`` over ``against`` on their shared prompts; tokens_per_s is None when parity failed on either side."""

    label: str
    against: str
    accept_length: PairedRatio
    tokens_per_s: PairedRatio | None


def load_results(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """The generation results among the files, in order, and one note per file of another kind.

    Raises ValueError for a file that is no result or when none is left, OSError when one cannot be read.
    """
    records, notes = [], []
    for path in dict.fromkeys(os.path.normpath(path) for path in paths):
        try:
            records.append((path, read_record(path)))
        except OtherKindError as error:
            notes.append(f"skipped {error}")
    if not records:
        raise ValueError(f"no generation result among {len(paths)} file(s)")
    heads = [record.head for _, record in records]
    names = [os.path.splitext(os.path.basename(path))[0] for path, _ in records]
    files = [path if names.count(name) > 1 else name for name, (path, _) in zip(names, records, strict=True)]
    results = [
        Result(path, f"{record.head} ({file})" if heads.count(record.head) > 1 else record.head, record)
        for file, (path, record) in zip(files, records, strict=True)
    ]
    return results, notes


def parity_failed(record: Record) -> bool:
    """True when greedy decoding with the head gave other tokens than without it, for any prompt."""
    return record.parity is not None and record.parity.identical < record.parity.prompts


def acceptance(record: Record) -> str:
    """How drafts were accepted, in words."""
    return describe(record.config.decoding.model_dump())


def parity_of(record: Record) -> str:
    """``identical/prompts``, or why there is none."""
    if record.parity and record.parity.prompts:
        return f"{record.parity.identical}/{record.parity.prompts}"
    return "not applicable" if record.config.decoding.temperature else "not checked"


def num_passes(record: Record) -> int:
    """Decoding passes of all rows."""
    return sum(row.passes for row in record.per_prompt)


def draft_ms(record: Record) -> float | None:
    """Milliseconds of drafting per decoding pass; None when unknown or without a pass."""
    passes, seconds = num_passes(record), record.timing.draft_s
    return None if seconds is None or not passes else 1e3 * seconds / passes


def summarise(result: Result) -> Summary:
    """The line of one result."""
    record = result.record
    metrics, timing = record.metrics, record.timing
    share = None
    if None not in (timing.draft_s, timing.total_s, timing.prefill_s) and timing.total_s > timing.prefill_s:
        share = timing.draft_s / (timing.total_s - timing.prefill_s)
    failed, checkpoint, adaptation = parity_failed(record), record.checkpoint, record.adaptation
    return Summary(
        label=result.label,
        path=result.path,
        head=record.head,
        backbone=Path(record.config.backbone.path).name,
        device=str(record.provenance.get("device_name") or record.provenance.get("device") or "unknown"),
        dtype=record.config.backbone.dtype,
        data="/".join(Path(record.data.path).parts[-2:]),
        nodes=record.config.decoding.num_nodes,
        prompts=len(record.per_prompt),
        num_prompts=record.data.num_prompts,
        accept_length=metrics.accept_length,
        accept_length_ci=metrics.accept_length_ci,
        tokens_per_s=metrics.tokens_per_s,
        speedup=None if failed else metrics.speedup,
        speedup_ci=None if failed else metrics.speedup_ci,
        overhead=metrics.overhead,
        draft_share=share,
        draft_ms=draft_ms(record),
        parameters=checkpoint.parameters if checkpoint else None,
        train_s=checkpoint.train_s if checkpoint else None,
        parity=parity_of(record),
        parity_failed=failed,
        interrupted=record.status == "interrupted",
        greedy_agreement=adaptation.greedy_agreement if adaptation else None,
        token_agreement=adaptation.token_agreement if adaptation else None,
        adapted=adaptation is not None,
        acceptance=acceptance(record),
        total_variation=metrics.total_variation,
    )


def sort_summaries(summaries: Sequence[Summary], column: str) -> list[Summary]:
    """Best first, text by alphabet, unknown last; ties keep their order. Raises ValueError for an unknown column."""
    if column not in SORT_COLUMNS:
        close = difflib.get_close_matches(column, SORT_COLUMNS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown column {column!r}.{hint} Available: {', '.join(SORT_COLUMNS)}")
    known = [summary for summary in summaries if getattr(summary, column) is not None]
    unknown = [summary for summary in summaries if getattr(summary, column) is None]
    return sorted(known, key=lambda summary: getattr(summary, column), reverse=bool(SORT_COLUMNS[column])) + unknown


# Conditions that decide which tokens and passes there are; the others decide what they cost.
SAME_WORK = (
    "dtype", "backbone fingerprint", "prompts sha256", "num_prompts", "tree budget (num_nodes)", "max_new_tokens",
    "acceptance", "template",
)  # fmt: skip


def unequal_conditions(results: Sequence[Result]) -> dict[str, str]:
    """Condition -> a sentence, for each in which the results differ though a fair comparison needs them equal.

    Tree budgets are compared among heads only: autoregressive decoding has no tree.
    """
    heads = [result for result in results if result.record.head != AUTOREGRESSIVE]
    fields: list[tuple[str, Sequence[Result], Callable[[Record], object]]] = [
        ("device", results, lambda record: record.provenance.get("device")),
        ("device_name", results, lambda record: record.provenance.get("device_name")),
        ("threads", results, lambda record: record.provenance.get("threads")),
        ("dtype", results, lambda record: record.config.backbone.dtype),
        ("backbone fingerprint", results, lambda record: record.config.backbone.fingerprint),
        ("weights", results, lambda record: record.config.backbone.storage or record.config.backbone.dtype),
        ("backbone engine", results, lambda record: record.config.backbone.engine),
        ("prompts sha256", results, lambda record: record.data.sha256),
        ("num_prompts", results, lambda record: record.data.num_prompts),
        ("tree budget (num_nodes)", heads, lambda record: record.config.decoding.num_nodes),
        ("max_new_tokens", results, lambda record: record.config.decoding.max_new_tokens),
        ("acceptance", results, acceptance),
        ("kind of tree", heads, lambda record: "dynamic" if record.config.decoding.tree is None else "fixed"),
        ("batch_size", results, lambda record: record.config.decoding.batch_size),
        ("template", results, lambda record: record.config.decoding.template),
        ("git_sha", results, lambda record: record.provenance.get("git_sha")),
    ]
    sentences = {}
    for name, among, value_of in fields:
        files_by_value: dict[str, list[str]] = {}
        for result in among:
            value = value_of(result.record)
            files_by_value.setdefault("unknown" if value is None else str(value), []).append(result.path)
        if len(files_by_value) > 1:
            values = "; ".join(f"{value} in {', '.join(files)}" for value, files in files_by_value.items())
            sentences[name] = f"{name} differs: {values}"
    return sentences


def differences(results: Sequence[Result]) -> list[str]:
    """One sentence per unequal condition, and one on results of uncommitted code."""
    sentences = list(unequal_conditions(results).values())
    dirty = [result.path for result in results if result.record.provenance.get("git_dirty")]
    if dirty:
        sentences.append(f"measured with uncommitted changes (git_dirty): {', '.join(dirty)}")
    return sentences


def head_to_head(result: Result, against: Result, num_resamples: int = 2000) -> HeadToHead:
    """Paired ratios of accept length and tokens/s over the prompts both results hold.

    Raises ValueError when the two were measured on different prompt files: equal ids would not be equal prompts.
    """
    if result.record.data.sha256 != against.record.data.sha256:
        raise ValueError(f"{result.label} and {against.label} were measured on different prompt files")
    rows, others = result.record.per_prompt, against.record.per_prompt
    refused = parity_failed(result.record) or parity_failed(against.record)
    return HeadToHead(
        label=result.label,
        against=against.label,
        accept_length=paired_ratio(rows, others, "accept_length", num_resamples),
        tokens_per_s=None if refused else paired_ratio(rows, others, "tokens_per_s", num_resamples),
    )


def find_result(results: Sequence[Result], name: str) -> Result:
    """The result that ``name`` means: a path, a label, a file's name without its ending, or a head's name.

    Raises ValueError, with what there is, when it names none of them or several.
    """
    ways: list[Callable[[Result], str]] = [
        lambda result: result.path,
        lambda result: result.label,
        lambda result: os.path.splitext(os.path.basename(result.path))[0],
        lambda result: result.record.head,
    ]
    for way in ways:
        found = [result for result in results if way(result) == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{name!r} names {len(found)} results; use a file: {', '.join(r.path for r in found)}")
    available = [result.label for result in results]
    close = difflib.get_close_matches(name, available, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown head {name!r}.{hint} Available: {', '.join(available)}")


def format_millions(count: int | None) -> str:
    """``4.46``, in millions; ``-`` for unknown."""
    return "-" if count is None else "0" if count == 0 else format_number(count / 1e6)


def format_number(value: float | None, interval: Interval | None = None) -> str:
    """``2.31 [2.25, 2.37]``, three significant figures at least; ``-`` for unknown."""
    if value is None:
        return "-"
    text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return text if interval is None else f"{text} [{format_number(interval[0])}, {format_number(interval[1])}]"
