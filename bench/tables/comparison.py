"""Results on one table: who accepts more, who is faster, and whether the comparison is fair."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.record.metrics import PairedRatio, paired_ratio
from bench.record.schema import AUTOREGRESSIVE
from bench.tables.numbers import format_number, plain_rows
from bench.tables.projection.projection import (
    ASSUMED,
    PUBLISHED_ASSUMED,
    Profile,
    project,
    project_published,
    projection_warnings,
    read_profile,
    show_projection,
    show_published,
)
from bench.tables.results import (
    Result,
    differences,
    find_result,
    parity_failed,
    read_results,
    results_frame,
    sort_results,
)
from bench.tables.summary import PARITY_FAILED, sampling_mark, summary_cells, with_marks
from bench.tables.terminal import show_table
from bench.tables.training import is_off, join, read_train_records
from runtime.atomic import check_writable, write_file

HEADER = {
    "head": "head",
    "backbone": "backbone",
    "nodes": "nodes",
    "dtype": "dtype",
    "prompts": "prompts",
    "accept_length": "accept length [95%]",
    "tokens_per_s": "tokens/s",
    "speedup": "speedup [95%]",
    "overhead": "overhead",
    "draft_share": "draft share",
    "draft_ms": "draft ms/pass",
    "parameters": "parameters [M]",
    "train_s": "train s",
    "parity": "parity",
}
WORDS = ("head", "backbone", "dtype")  # columns of words
# The columns of a result in the JSON; each interval is one entry there.
JSON_COLUMNS = (
    "label", "path", "head", "backbone", "device", "dtype", "data", "nodes", "prompts", "num_prompts", "accept_length",
    "accept_length_ci", "tokens_per_s", "speedup", "speedup_ci", "overhead", "draft_share", "draft_ms", "parameters",
    "train_s", "parity", "parity_failed", "interrupted", "greedy_agreement", "token_agreement", "adapted", "acceptance",
    "total_variation",
)  # fmt: skip


@dataclass(frozen=True)
class HeadToHead:
    """``label`` over ``against`` on their shared prompts; tokens_per_s is None if parity failed on either side."""

    label: str
    against: str
    accept_length: PairedRatio
    tokens_per_s: PairedRatio | None


@dataclass
class Comparison:
    """Everything that is shown. promises: of ``bench.tables.training.join``; profile, projected, published: None if
    not asked for."""

    frame: pd.DataFrame | None
    pairs: list[HeadToHead]
    warnings: list[str]
    promises: pd.DataFrame | None
    profile: Profile | None
    projected: pd.DataFrame | None
    published: pd.DataFrame | None


def compare(
    paths: Sequence[str],
    *,
    plot: str | None = None,
    frontier: str | None = None,
    sort: str | None = None,
    json_path: str | None = None,
    pair: Sequence[str] | None = None,
    profile: str | None = None,
    profile_shape: str | None = None,
    published: bool = False,
) -> None:
    """Read everything, decide everything, then write and print.

    paths: results and train records. plot, frontier, json_path: files to write. sort: a column. pair: (A, B) for the
    ratio A / B only. profile: an engine measurement to project onto, and which of its shapes.
    Raises ValueError or OSError before any output.
    """
    if not paths and not published:
        raise ValueError("give result files of bench/run.py, or --published with --profile FILE")
    if published and not profile:
        raise ValueError("--published needs the curve of a machine; give --profile FILE as well")
    if profile_shape and not profile:
        raise ValueError("--profile-shape names a shape of a profile; give --profile FILE as well")
    machine = read_profile(profile, profile_shape) if profile else None
    results, notes, found = [], [], Comparison(None, [], [], None, machine, None, None)
    if paths:
        others, train_records = read_train_records(paths)
        results, notes = read_results(others)
        frame = results_frame(results)
        found.promises, broken = join(frame, train_records)
        found.frame = sort_results(frame, sort) if sort else frame
        found.pairs, skipped = pair_up(results, pair)
        found.warnings = differences(frame) + skipped + doubts(found.frame) + broken
        if machine:
            found.projected = project(frame, machine)
            found.warnings += projection_warnings(frame, machine)
    found.published = project_published(machine) if published else None

    check_targets([target for target in (plot, frontier, json_path) if target is not None], paths)
    if plot is not None or frontier is not None:
        from bench.tables.plots.comparison import draw  # seaborn takes seconds to import

        draw(results, plot, frontier)
    if json_path is not None:
        write_file(json_path, comparison_json(found))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    show(found)


def check_targets(targets: Sequence[str], sources: Sequence[str]) -> None:
    """Raises OSError if a target cannot be written, ValueError if it would overwrite a source or another target."""
    for number, target in enumerate(targets):
        if Path(target).resolve() in {Path(source).resolve() for source in sources}:
            raise ValueError(f"{target}: is one of the results to compare; write elsewhere")
        if Path(target).resolve() in {Path(other).resolve() for other in targets[:number]}:
            raise ValueError(f"{target}: two outputs would go there; name two files")
        check_writable(target)


def show(found: Comparison) -> None:
    """Print the tables."""
    if found.frame is not None:
        show_results(found.frame, found.promises)
    if found.pairs:
        show_pairs(found.pairs)
    if found.projected is not None:
        show_projection(found.projected, found.profile)
        print(ASSUMED)
    if found.published is not None:
        show_published(found.published, found.profile)
        print(PUBLISHED_ASSUMED)


def show_results(frame: pd.DataFrame, promises: pd.DataFrame | None = None) -> None:
    """Print one row per result. promises: without any, there are no columns about them."""
    cells = summary_cells(frame)
    cells["head"] = [
        with_marks(row.label, sampling_mark(row.acceptance), "interrupted" * row.interrupted)
        for row in frame.itertuples()
    ]
    cells = cells[list(HEADER)].rename(columns=HEADER)
    if promises is not None and len(promises):
        own = promises.reindex(frame["path"])
        cells["steps"] = ["-" if pd.isna(steps) else f"{steps:,}" for steps in own["steps"]]
        cells["expected"] = [format_number(value) for value in own["expected"]]
        marks = is_off(own["ratio"]).map({True: " !", False: ""})
        cells["measured / expected"] = [
            format_number(ratio) + mark for ratio, mark in zip(own["ratio"], marks, strict=True)
        ]
    failed = set(frame.loc[frame["parity_failed"], "parity"])

    def style(column: str, cell: str) -> str:
        if cell == PARITY_FAILED or (column == "parity" and cell in failed):
            return "red"
        return "yellow" if (column == "head" and "interrupted)" in cell) or cell.endswith(" !") else ""

    show_table("Results", cells, WORDS, style)


def pair_up(results: Sequence[Result], names: Sequence[str] | None) -> tuple[list[HeadToHead], list[str]]:
    """The pairs to compare, and a sentence for each that cannot be.

    names: (A, B) for A / B alone; without, every other head over the first. The baseline's record takes part only if
    named. Raises ValueError for unknown names and for a named pair that cannot be compared.
    """
    if names:
        first, second = (find_result(results, name) for name in names)
        if first is second:
            raise ValueError(f"{names[0]!r} and {names[1]!r} are the same result")
        return [head_to_head(first, second)], []
    pairs, skipped = [], []
    heads = [result for result in results if result.record.head != AUTOREGRESSIVE]
    for result in heads[1:]:
        try:
            pairs.append(head_to_head(result, heads[0]))
        except ValueError as error:
            skipped.append(f"no paired ratio: {error}")
    return pairs, skipped


def head_to_head(result: Result, against: Result) -> HeadToHead:
    """Paired ratios of accept length and tokens/s over the prompts both results hold.

    Raises ValueError if the two were measured on different prompt files: equal ids would not be equal prompts.
    """
    if result.record.data.sha256 != against.record.data.sha256:
        raise ValueError(f"{result.label} and {against.label} were measured on different prompt files")
    rows = result.record.per_prompt, against.record.per_prompt
    refused = parity_failed(result.record) or parity_failed(against.record)
    return HeadToHead(
        label=result.label,
        against=against.label,
        accept_length=paired_ratio(*rows, "accept_length"),
        tokens_per_s=None if refused else paired_ratio(*rows, "tokens_per_s"),
    )


def show_pairs(pairs: Sequence[HeadToHead]) -> None:
    """Print one row per pair of heads."""
    rows = []
    for pair in pairs:
        length, speed = pair.accept_length, pair.tokens_per_s
        rows.append(
            {
                "ratio": f"{pair.label} / {pair.against}",
                "prompts": str(length.num_prompts),
                "accept length [95%]": format_number(length.ratio, length.interval),
                "tokens/s [95%]": PARITY_FAILED if speed is None else format_number(speed.ratio, speed.interval),
            }
        )
    show_table("Ratios on shared prompts, paired by prompt", pd.DataFrame(rows), ["ratio"])


def doubts(frame: pd.DataFrame) -> list[str]:
    """What is doubtful about single results."""
    sentences = []
    for row in frame.itertuples():
        if row.parity_failed:
            sentences.append(f"parity failed ({row.parity} identical), speedup refused: {row.path}")
        elif not pd.isna(row.speedup) and row.parity == "not checked":
            sentences.append(f"parity was not checked, so the speedup is unverified: {row.path}")
        if row.adapted and pd.isna(row.greedy_agreement):
            sentences.append(f"{row.label} changes the backbone; its speedup is over the original: {row.path}")
        elif row.adapted:
            share, tokens = 100 * row.greedy_agreement, 100 * row.token_agreement
            sentences.append(
                f"{row.label} changes the backbone: {share:.0f}% of its texts are the original's, {tokens:.1f}% of the "
                f"tokens up to the first difference; its speedup is over the original, parity with the changed one: "
                f"{row.path}"
            )
        if row.total_variation > 0:
            sentences.append(
                f"{row.label} changes the distribution: the choice of its tokens is {row.total_variation:.3f} away "
                f"from sampling (mean total variation): {row.path}"
            )
        if row.interrupted:
            sentences.append(f"interrupted after {row.prompts} of {row.num_prompts} prompts: {row.path}")
    return sentences


def comparison_json(found: Comparison) -> str:
    """The comparison as JSON text; ratios that are refused are null, and so are projections that were not made."""

    def ratio(pair: PairedRatio | None) -> dict | None:
        return None if pair is None else {"ratio": pair.ratio, "interval": pair.interval}

    content = {
        "schema_version": 1,
        "kind": "comparison",
        "results": [] if found.frame is None else [_json_row(row) for row in plain_rows(found.frame)],
        "head_to_head": [
            {
                "head": pair.label,
                "against": pair.against,
                "prompts": pair.accept_length.num_prompts,
                "accept_length": ratio(pair.accept_length),
                "tokens_per_s": ratio(pair.tokens_per_s),
            }
            for pair in found.pairs
        ],
        "trainings": {}
        if found.promises is None
        else dict(zip(found.promises.index, plain_rows(found.promises), strict=True)),
        "projection": None,
        "warnings": found.warnings,
    }
    if found.projected is not None:
        machine = found.profile
        named = {"profile": machine.path, "device": machine.device, "shape": machine.shape, "dtype": machine.dtype}
        content["projection"] = {**named, "assumed": ASSUMED, "results": plain_rows(found.projected)}
    if found.published is not None:
        content["published"] = {"assumed": PUBLISHED_ASSUMED, "results": plain_rows(found.published)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _json_row(row: dict) -> dict:
    for name in ("accept_length", "speedup"):
        interval = [row[f"{name}_low"], row[f"{name}_high"]]
        row[f"{name}_ci"] = None if None in interval else interval
    return {name: row[name] for name in JSON_COLUMNS}
