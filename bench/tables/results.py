"""Results side by side, as a data frame with one row per result file. In a notebook:

    from bench.tables.results import load_results
    frame = load_results(Path("results").glob("*.json"))
    frame.set_index("head")[["accept_length", "speedup", "draft_ms"]].sort_values("speedup")

All tables are made from this frame, so that a table in a terminal and a table in a README cannot disagree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record.schema import AUTOREGRESSIVE, Record
from decoding.options import describe_acceptance
from runtime.entry import suggest
from runtime.files.documents import identity
from runtime.records import OtherKindError

INTEGERS = ("nodes", "prompts", "num_prompts", "parameters", "seed", "train_steps", "train_tokens", "checkpoint_nodes",
            "threads", "max_new_tokens", "batch_size", "passes", "num_layers", "hidden_size")  # fmt: skip
FLOATS = ("accept_length", "accept_length_low", "accept_length_high", "tokens_per_s", "speedup", "speedup_low",
          "speedup_high", "overhead", "draft_share", "draft_ms", "train_s", "greedy_agreement", "token_agreement",
          "total_variation", "checkpoint_accept_length", "predicted_accept_length", "draft_s", "baseline_s_per_token",
          "context_rows")  # fmt: skip
# Columns that a table may be sorted by -> whether the smallest value comes first.
SORTABLE = dict.fromkeys(("head", "backbone", "device", "dtype", "data", "parity"), True)
SORTABLE |= dict.fromkeys(("nodes", "prompts", "accept_length", "tokens_per_s", "speedup"), False)
SORTABLE |= dict.fromkeys(("overhead", "draft_share", "draft_ms", "parameters", "train_s"), True)


@dataclass(frozen=True)
class Result:
    """A record and its file. label: the head's name, with the file's name if heads repeat."""

    path: str
    label: str
    record: Record


@dataclass(frozen=True)
class Condition:
    """What has to be equal for a fair comparison. heads_only: the baseline has no tree. same_work: it decides which
    tokens and passes there are; the others decide what they cost."""

    name: str
    column: str
    heads_only: bool = False
    same_work: bool = False


CONDITIONS = (
    Condition("device", "device_kind"),
    Condition("device_name", "device_name"),
    Condition("threads", "threads"),
    Condition("dtype", "dtype", same_work=True),
    Condition("backbone fingerprint", "backbone_fingerprint", same_work=True),
    Condition("weights", "storage"),
    Condition("backbone engine", "engine"),
    Condition("prompts sha256", "prompts_sha256", same_work=True),
    Condition("num_prompts", "num_prompts", same_work=True),
    Condition("tree budget (num_nodes)", "nodes", heads_only=True, same_work=True),
    Condition("max_new_tokens", "max_new_tokens", same_work=True),
    Condition("acceptance", "acceptance", same_work=True),
    Condition("kind of tree", "tree_kind", heads_only=True),
    Condition("batch_size", "batch_size"),
    Condition("template", "template", same_work=True),
    Condition("git_sha", "git_sha"),
)


def load_results(paths: Iterable[str | Path]) -> pd.DataFrame:
    """One row per result file of ``bench/run.py``, files of another kind left out.

    Who and where: label, path, head, head_options (JSON), seed (of the training), backbone, device, dtype, data.
    What was measured: accept_length (tokens per pass), tokens_per_s, speedup, each of the first and the last with its
    95% interval as ..._low and ..._high, overhead, draft_share (of the decoding seconds), draft_ms (per pass),
    draft_s and passes (in all), baseline_s_per_token, prompts (of num_prompts). Whether it holds: parity
    ("identical/prompts", "not checked", or "not applicable" for sampled texts), parity_failed, interrupted, adapted
    (the head changes the backbone), greedy_agreement, token_agreement, total_variation. speedup is unknown if parity
    failed. What the head took: parameters, train_s, train_steps, train_tokens. What else has to be equal: the columns
    of CONDITIONS. Unknown values are NaN or <NA>.

    Raises ValueError for a file that is no result and if none is left, OSError if one cannot be read.
    """
    return results_frame(read_results([str(path) for path in paths])[0])


def read_results(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """The results among the files, in order, and one note per file of another kind. Raises as ``load_results``."""
    records, notes = [], []
    for path in dict.fromkeys(os.path.normpath(path) for path in paths):
        try:
            records.append((path, Record.read(path)))
        except OtherKindError as error:
            if error.kind == "missing":
                raise
            notes.append(f"skipped {error}")
    if not records:
        raise ValueError(f"no generation result among {len(paths)} file(s)")
    heads, names = [record.head for _, record in records], [Path(path).stem for path, _ in records]
    results = []
    for name, (path, record) in zip(names, records, strict=True):
        file = path if names.count(name) > 1 else name
        label = f"{record.head} ({file})" if heads.count(record.head) > 1 else record.head
        results.append(Result(path, label, record))
    return results, notes


def results_frame(results: Sequence[Result]) -> pd.DataFrame:
    """The frame of ``load_results``."""
    frame = pd.DataFrame([_row(result) for result in results])
    return frame.astype(dict.fromkeys(INTEGERS, "Int64") | dict.fromkeys(FLOATS, float))


def _row(result: Result) -> dict[str, Any]:
    record = result.record
    backbone, decoding, metrics, timing = (
        record.config.backbone, record.config.decoding, record.metrics, record.timing,
    )  # fmt: skip
    passes, place = sum(row.passes for row in record.per_prompt), record.provenance
    checkpoint = record.checkpoint.model_dump() if record.checkpoint else {}
    baseline, adaptation, failed = record.baseline, record.adaptation, parity_failed(record)
    turns = sum(row.turns for row in record.per_prompt)
    draft_share = None
    if None not in (timing.draft_s, timing.total_s, timing.prefill_s) and timing.total_s > timing.prefill_s:
        draft_share = timing.draft_s / (timing.total_s - timing.prefill_s)
    return {
        "label": result.label,
        "path": result.path,
        "head": record.head,
        "backbone": Path(backbone.path).name,
        "device": str(place.get("device_name") or place.get("device") or "unknown"),
        "dtype": backbone.dtype,
        "data": "/".join(Path(record.data.path).parts[-2:]),
        "nodes": decoding.num_nodes,
        "prompts": len(record.per_prompt),
        "num_prompts": record.data.num_prompts,
        "accept_length": metrics.accept_length,
        **_interval("accept_length", metrics.accept_length_ci),
        "tokens_per_s": metrics.tokens_per_s,
        "speedup": None if failed else metrics.speedup,
        **_interval("speedup", None if failed else metrics.speedup_ci),
        "overhead": metrics.overhead,
        "draft_share": draft_share,
        "draft_ms": None if timing.draft_s is None or not passes else 1e3 * timing.draft_s / passes,
        "parameters": checkpoint.get("parameters"),
        "train_s": checkpoint.get("train_s"),
        "parity": _parity(record),
        "parity_failed": failed,
        "interrupted": record.status == "interrupted",
        "greedy_agreement": adaptation.greedy_agreement if adaptation else None,
        "token_agreement": adaptation.token_agreement if adaptation else None,
        "adapted": adaptation is not None,
        "acceptance": describe_acceptance(decoding.model_dump()),
        "total_variation": metrics.total_variation,
        # What has to be equal
        "device_kind": place.get("device"),
        "device_name": place.get("device_name"),
        "threads": place.get("threads"),
        "backbone_fingerprint": backbone.fingerprint,
        "storage": backbone.storage or backbone.dtype,
        "engine": backbone.engine,
        "prompts_sha256": record.data.sha256,
        "max_new_tokens": decoding.max_new_tokens,
        "tree_kind": "dynamic" if decoding.tree is None else "fixed",
        "batch_size": decoding.batch_size,
        "template": decoding.template,
        "git_sha": place.get("git_sha"),
        "git_dirty": bool(place.get("git_dirty")),
        # The training, and what it and a calibration promised
        "head_options": identity(record.config.head, sort_keys=True),
        "seed": checkpoint.get("seed"),
        "train_steps": checkpoint.get("train_steps"),
        "train_tokens": checkpoint.get("train_tokens"),
        "checkpoint_path": checkpoint.get("path"),
        "checkpoint_sha256": checkpoint.get("sha256"),
        "checkpoint_accept_length": checkpoint.get("expected_accept_length"),
        "checkpoint_nodes": checkpoint.get("tree_nodes"),
        "predicted_accept_length": record.prediction.accept_length if record.prediction else None,
        # What a projection needs
        "passes": passes,
        "draft_s": timing.draft_s,
        "baseline_s_per_token": baseline.total_s / baseline.tokens
        if baseline and baseline.tokens and baseline.total_s else None,
        "context_rows": sum(row.prompt_tokens + row.tokens / 2 for row in record.per_prompt) / max(1, turns),
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
    }  # fmt: skip


def _interval(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def parity_failed(record: Record) -> bool:
    """Whether greedy decoding with the head gave other tokens than without it, for any prompt."""
    return record.parity is not None and record.parity.identical < record.parity.prompts


def _parity(record: Record) -> str:
    if record.parity and record.parity.prompts:
        return f"{record.parity.identical}/{record.parity.prompts}"
    return "not applicable" if record.config.decoding.temperature else "not checked"


def sort_results(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Best first, text by alphabet, unknown last; ties keep their order. Raises ValueError for an unknown column."""
    if column not in SORTABLE:
        raise suggest("column", column, SORTABLE)
    return frame.sort_values(column, ascending=SORTABLE[column], na_position="last", kind="stable")


def unequal_conditions(frame: pd.DataFrame) -> dict[Condition, str]:
    """A sentence for each condition in which the results differ."""
    sentences = {}
    for condition in CONDITIONS:
        among = frame[frame["head"] != AUTOREGRESSIVE] if condition.heads_only else frame
        column = among[condition.column].astype(object)
        files = among["path"].groupby(column.where(column.notna(), "unknown").astype(str), sort=False).agg(", ".join)
        if len(files) > 1:
            values = "; ".join(f"{value} in {paths}" for value, paths in files.items())
            sentences[condition] = f"{condition.name} differs: {values}"
    return sentences


def differences(frame: pd.DataFrame) -> list[str]:
    """One sentence per unequal condition, and one on results of uncommitted code."""
    sentences = list(unequal_conditions(frame).values())
    if frame["git_dirty"].any():
        files = ", ".join(frame.loc[frame["git_dirty"], "path"])
        sentences.append(f"measured with uncommitted changes (git_dirty): {files}")
    return sentences


def find_result(results: Sequence[Result], name: str) -> Result:
    """The result with this path, label, file name without its ending, or head.

    Raises ValueError, with the available names, if there is none or several.
    """
    for key in (
        lambda result: result.path,
        lambda result: result.label,
        lambda result: Path(result.path).stem,
        lambda result: result.record.head,
    ):
        found = [result for result in results if key(result) == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{name!r} names {len(found)} results; use a file: {', '.join(r.path for r in found)}")
    raise suggest("head", name, [result.label for result in results])
