"""Results on one table: who accepts more, who is faster, and whether the comparison is fair."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record.metrics import over_seeds
from bench.record.schema import AUTOREGRESSIVE
from bench.tables.numbers import format_number, plain_rows
from bench.tables.projection.projection import (
    ASSUMED,
    PUBLISHED_ASSUMED,
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
from bench.tables.summary import PARITY_FAILED, WORDS, header, sampling_mark, summary_cells, with_marks
from bench.tables.terminal import show_table
from bench.tables.training import is_off, join, read_train_records
from runtime.atomic import check_writable
from runtime.files.documents import write_json
from runtime.options import option

COLUMNS = ("head", "backbone", "nodes", "dtype", "prompts", "accept_length", "tokens_per_s", "speedup", "overhead",
           "draft_share", "draft_ms", "parameters", "train_s", "parity")  # fmt: skip
# The columns of a result in the JSON; each interval is one entry there.
JSON_COLUMNS = (
    "label", "path", "head", "backbone", "device", "dtype", "data", "nodes", "prompts", "num_prompts", "accept_length",
    "accept_length_ci", "tokens_per_s", "speedup", "speedup_ci", "overhead", "draft_share", "draft_ms", "parameters",
    "train_s", "parity", "parity_failed", "interrupted", "greedy_agreement", "token_agreement", "adapted", "acceptance",
    "total_variation",
)  # fmt: skip


@dataclass
class CompareOptions:
    """The options of bench/compare.py."""

    results: list[str] = option(
        [], "result files of bench/run.py, and train.json", name="results", nargs="*", metavar="RESULT"
    )
    plot: str | None = option(None, "draw accept length and cost per pass into a .png, .pdf or .svg", metavar="FILE")
    frontier: str | None = option(
        None, "draw accept length against draft time into a .png, .pdf or .svg", metavar="FILE"
    )
    sort: str | None = option(None, "sort the table by a column, the best value first", metavar="COLUMN")
    json: str | None = option(None, "write the comparison as JSON", metavar="FILE")
    head_to_head: list[str] = option([], "give the ratios A / B only (heads or files)", nargs=2, metavar=("A", "B"))
    profile: str | None = option(
        None, "a result of bench/engine.py: project the results onto that machine", metavar="FILE"
    )
    profile_shape: str | None = option(None, "shape of the profile (default: its first)", metavar="NAME")
    published: bool = option(False, "project published results onto the profile's 7b shape too")

    def check(self) -> None:
        """Raises ValueError for options that miss another one."""
        if not self.results and not self.published:
            raise ValueError("give result files of bench/run.py, or --published with --profile FILE")
        if self.published and not self.profile:
            raise ValueError("--published needs the curve of a machine; give --profile FILE as well")
        if self.profile_shape and not self.profile:
            raise ValueError("--profile-shape names a shape of a profile; give --profile FILE as well")


def compare(options: CompareOptions) -> None:
    """Read everything, decide everything, then write and print. Raises ValueError or OSError before any output."""
    machine = read_profile(options.profile, options.profile_shape) if options.profile else None
    content = {"schema_version": 1, "kind": "comparison", "results": [], "head_to_head": [], "trainings": {},
               "projection": None}  # fmt: skip
    results, notes, warnings, projected, published = [], [], [], None, None
    if options.results:
        others, train_records = read_train_records(options.results)
        results, notes = read_results(others)
        frame = results_frame(results)
        promises, broken = join(frame, train_records)
        shown = sort_results(frame, options.sort) if options.sort else frame
        pairs, skipped = pair_up(results, options.head_to_head)
        warnings = differences(frame) + skipped + doubts(shown) + broken
        content["results"] = [_json_row(row) for row in plain_rows(shown)]
        content["head_to_head"] = pairs
        content["trainings"] = dict(zip(promises.index, plain_rows(promises), strict=True))
    if results and machine:
        projected = project(frame, machine)
        warnings += projection_warnings(frame, machine)
        named = {"profile": machine.path, "device": machine.device, "shape": machine.shape, "dtype": machine.dtype}
        content["projection"] = {**named, "assumed": ASSUMED, "results": plain_rows(projected)}
    content["warnings"] = warnings
    if options.published:
        published = project_published(machine)
        content["published"] = {"assumed": PUBLISHED_ASSUMED, "results": plain_rows(published)}

    check_targets(filter(None, (options.plot, options.frontier, options.json)), options.results)
    if options.plot or options.frontier:
        from bench.tables.plots.comparison import draw  # seaborn takes seconds to import

        draw(results, options.plot, options.frontier)
    if options.json:
        write_json(options.json, content, indent=1)
    print_doubts(notes, warnings)
    if results:
        show_results(shown, promises)
        show_pairs(pairs)
    if projected is not None:
        show_projection(projected, machine)
    if published is not None:
        show_published(published, machine)


def check_targets(targets: Iterable[str], sources: Sequence[str]) -> None:
    """Raises OSError if a target cannot be written, ValueError if it would overwrite a source or another target."""
    taken = {Path(source).resolve(): "is one of the results to compare; write elsewhere" for source in sources}
    for target in targets:
        if Path(target).resolve() in taken:
            raise ValueError(f"{target}: {taken[Path(target).resolve()]}")
        taken[Path(target).resolve()] = "two outputs would go there; name two files"
        check_writable(target)


def print_doubts(notes: Sequence[str], warnings: Sequence[str]) -> None:
    """Notes and warnings, a line each on stderr."""
    for kind, texts in (("note", notes), ("warning", warnings)):
        for text in texts:
            print(f"{kind}: {text}", file=sys.stderr)


def show_results(frame: pd.DataFrame, promises: pd.DataFrame | None = None) -> None:
    """Print one row per result. promises: without any, there are no columns about them."""
    cells = summary_cells(frame)
    cells["head"] = [
        with_marks(row.label, sampling_mark(row.acceptance), "interrupted" * row.interrupted)
        for row in frame.itertuples()
    ]
    cells = cells[list(COLUMNS)].rename(columns=header("en") | {"draft_ms": "draft ms/pass"})
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


def pair_up(results: Sequence[Result], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
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


def head_to_head(result: Result, against: Result) -> dict[str, Any]:
    """Paired ratios of accept length and tokens/s over the prompts both results hold, as the JSON holds them:
    tokens_per_s is None if parity failed on either side.

    Raises ValueError if the two were measured on different prompt files: equal ids would not be equal prompts.
    """
    if result.record.data.sha256 != against.record.data.sha256:
        raise ValueError(f"{result.label} and {against.label} were measured on different prompt files")
    mine, theirs = [result.record.per_prompt], [against.record.per_prompt]
    found = {name: over_seeds(mine, name, theirs, num_resamples=2000) for name in ("accept_length", "tokens_per_s")}
    ratios: dict[str, Any] = {name: {"ratio": each.value, "interval": each.interval} for name, each in found.items()}
    if parity_failed(result.record) or parity_failed(against.record):
        ratios["tokens_per_s"] = None
    prompts = found["accept_length"].num_prompts
    return {"head": result.label, "against": against.label, "prompts": prompts, **ratios}


def show_pairs(pairs: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per pair of heads, if there is any."""
    cells = [
        {
            "ratio": f"{pair['head']} / {pair['against']}",
            "prompts": str(pair["prompts"]),
            "accept length [95%]": format_number(*pair["accept_length"].values()),
            "tokens/s [95%]": format_number(*pair["tokens_per_s"].values()) if pair["tokens_per_s"] else PARITY_FAILED,
        }
        for pair in pairs
    ]
    if cells:
        show_table("Ratios on shared prompts, paired by prompt", pd.DataFrame(cells), ["ratio"])


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


def _json_row(row: dict) -> dict:
    for name in ("accept_length", "speedup"):
        interval = [row[f"{name}_low"], row[f"{name}_high"]]
        row[f"{name}_ci"] = None if None in interval else interval
    return {name: row[name] for name in JSON_COLUMNS}
