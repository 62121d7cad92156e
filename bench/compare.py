"""Compare results on one table: who accepts more, who is faster, and whether the comparison is fair.

    python bench/compare.py results/*.json --plot comparison.png --frontier frontier.png
    python bench/compare.py results/*.json runs/*/*/train.json
    python bench/compare.py --profile results/engine-7b.json --published

Differences in device, dtype, backbone, prompts, tree budget or acceptance are warned about on stderr; a result whose
parity check failed gets no speedup. From two results on, paired bootstrap intervals tell whether a ratio differs
from 1. Train records, anywhere among the files, put what their training expected beside what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.record.metrics import PairedRatio
from bench.record.schema import check_writable, write_atomically
from bench.tables.projection import (
    ASSUMED,
    PUBLISHED_ASSUMED,
    Profile,
    Projection,
    PublishedProjection,
    project,
    project_published,
    projection_table,
    projection_warnings,
    published_table,
    read_profile,
)
from bench.tables.summary import (
    AUTOREGRESSIVE,
    HeadToHead,
    Result,
    Summary,
    differences,
    find_result,
    format_millions,
    format_number,
    head_to_head,
    load_results,
    sort_summaries,
    summarise,
)
from bench.tables.training import Training, join, read_train_records
from runtime.entry import Parser, run_entry

REFUSED = "parity failed"


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/compare.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("results", nargs="*", metavar="RESULT", help="result files of bench/run.py, and train.json")
    parser.add_argument("--plot", metavar="FILE", help="draw accept length and cost per pass into a .png, .pdf or .svg")
    parser.add_argument(
        "--frontier", metavar="FILE", help="draw accept length against draft time into a .png, .pdf or .svg"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort the table by a column, the best value first")
    parser.add_argument("--json", metavar="FILE", help="write the comparison as JSON")
    parser.add_argument(
        "--head-to-head", nargs=2, metavar=("A", "B"), help="give the ratios A / B only (heads or files)"
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="a result of bench/engine.py: project the results onto that machine"
    )
    parser.add_argument("--profile-shape", metavar="NAME", help="shape of the profile (default: its first)")
    parser.add_argument(
        "--published", action="store_true", help="project what others have published onto the profile's 7b shape too"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit status: 0, or 2 after one ``error:`` line."""

    def run(arguments: Sequence[str]) -> None:
        options = build_parser().parse_args(arguments)
        compare(options)

    return run_entry(run, argv)


def compare(options: argparse.Namespace) -> None:
    """Read everything, decide everything, then print and write. Raises ValueError or OSError before any output."""
    if not options.results and not options.published:
        raise ValueError("give result files of bench/run.py, or --published with --profile FILE")
    results, notes, train_records = [], [], []
    if options.results:
        paths, train_records = read_train_records(options.results)
        results, notes = load_results(paths)
    trainings, broken_promises = join(results, train_records)
    summaries = [summarise(result) for result in results]
    if options.sort:
        summaries = sort_summaries(summaries, options.sort)
    pairs, skipped = pair_up(results, options.head_to_head)
    warnings = differences(results) + skipped + _doubts(summaries) + broken_promises
    projected = published = profile = None
    if options.published and not options.profile:
        raise ValueError("--published needs the curve of a machine; give --profile FILE as well")
    if options.profile_shape and not options.profile:
        raise ValueError("--profile-shape names a shape of a profile; give --profile FILE as well")
    if options.profile:
        profile = read_profile(options.profile, options.profile_shape)
        if results:
            projected = profile, [project(result, profile) for result in results]
            warnings += projection_warnings(results, profile)
        published = project_published(profile) if options.published else None

    targets = [target for target in (options.plot, options.frontier, options.json) if target is not None]
    for number, target in enumerate(targets):
        check_target(target, options.results)
        if Path(target).resolve() in {Path(other).resolve() for other in targets[:number]}:
            raise ValueError(f"{target}: is to hold two outputs; name two files")
    if options.plot is not None or options.frontier is not None:
        draw(results, options.plot, options.frontier)
    if options.json is not None:
        write_atomically(options.json, comparison_json(summaries, pairs, warnings, projected, trainings, published))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if results:
        show_table(summary_table(summaries, trainings))
    if pairs:
        show_table(head_to_head_table(pairs))
    if projected:
        show_table(projection_table(projected[1], projected[0]))
        print(ASSUMED)
    if published:
        show_table(published_table(published, profile))
        print(PUBLISHED_ASSUMED)


def draw(results: Sequence[Result], plot: str | None, frontier: str | None) -> None:
    """Draw what was asked for, once it is sure that all of it can be. Raises ValueError, OSError."""
    from bench.tables.plots import (  # seaborn takes seconds
        check_frontier,
        check_plot_path,
        draw_comparison,
        draw_frontier,
    )

    for target in (plot, frontier):
        if target is not None:
            check_plot_path(target)
    if frontier is not None:
        check_frontier(results)
    if plot is not None:
        draw_comparison(results, plot)
    if frontier is not None:
        draw_frontier(results, frontier)


def pair_up(results: Sequence[Result], names: Sequence[str] | None) -> tuple[list[HeadToHead], list[str]]:
    """The pairs to compare and a sentence for each that cannot be.

    names: (A, B) for A / B alone; without, every other head over the first. The autoregressive record takes
    part only when it is named. Raises ValueError for unknown names and for a named pair that cannot be compared.
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


def summary_table(summaries: Sequence[Summary], trainings: Mapping[str, Training] | None = None) -> Table:
    """One row per result. trainings: by the result's path; without any, there are no columns about them."""
    table = Table(title="Results", title_justify="left", title_style="bold")
    for name in ("head", "backbone", "nodes", "dtype", "prompts", "accept length [95%]", "tokens/s", "speedup [95%]"):
        table.add_column(name, justify="left" if name in ("head", "backbone", "dtype") else "right")
    for name in ("overhead", "draft share", "draft ms/pass", "parameters [M]", "train s", "parity"):
        table.add_column(name, justify="right")
    for name in ("steps", "expected", "measured / expected") if trainings else ():
        table.add_column(name, justify="right")
    for row in summaries:
        speedup = Text(REFUSED, style="red") if row.parity_failed else format_number(row.speedup, row.speedup_ci)
        share = "-" if row.draft_share is None else f"{100 * row.draft_share:.1f}%"
        marks = row.drawn + ["interrupted"] * row.interrupted
        cells = [
            Text(row.label + (f" ({', '.join(marks)})" if marks else ""), style="yellow" if row.interrupted else ""),
            row.backbone,
            str(row.nodes),
            row.dtype,
            str(row.prompts) if row.prompts == row.num_prompts else f"{row.prompts}/{row.num_prompts}",
            format_number(row.accept_length, row.accept_length_ci),
            format_number(row.tokens_per_s),
            speedup,
            format_number(row.overhead),
            share,
            format_number(row.draft_ms),
            format_millions(row.parameters),
            format_number(row.train_s),
            Text(row.parity, style="red" if row.parity_failed else ""),
            *(_training_cells(trainings.get(row.path)) if trainings else ()),
        ]
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    return table


def _training_cells(training: Training | None) -> list[Text]:
    """Steps, expected accept length, and the measured one over it, marked when it is off."""
    if training is None:
        return [Text("-")] * 3
    steps = "-" if training.steps is None else f"{training.steps:,}"
    mark, style = (" !", "yellow") if training.is_off else ("", "")
    return [Text(steps), Text(format_number(training.expected)), Text(format_number(training.ratio) + mark, style)]


def head_to_head_table(pairs: Sequence[HeadToHead]) -> Table:
    """One row per pair of heads."""
    table = Table(title="Ratios on shared prompts, paired by prompt", title_justify="left", title_style="bold")
    table.add_column("ratio")
    for name in ("prompts", "accept length [95%]", "tokens/s [95%]"):
        table.add_column(name, justify="right")
    for pair in pairs:
        ratio, speed = pair.accept_length, pair.tokens_per_s
        cells = (
            f"{pair.label} / {pair.against}",
            str(ratio.num_prompts),
            format_number(ratio.ratio, ratio.interval),
            REFUSED if speed is None else format_number(speed.ratio, speed.interval),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def comparison_json(
    summaries: Sequence[Summary],
    pairs: Sequence[HeadToHead],
    warnings: Sequence[str],
    projected: tuple[Profile, Sequence[Projection]] | None = None,
    trainings: Mapping[str, Training] | None = None,
    published: Sequence[PublishedProjection] | None = None,
) -> str:
    """The comparison as JSON text; ratios that are refused are null, and so are projections where none were made.
    trainings: by the result's path."""

    def ratio(pair: PairedRatio | None) -> dict | None:
        return None if pair is None else {"ratio": pair.ratio, "interval": pair.interval}

    content = {
        "schema_version": 1,
        "kind": "comparison",
        "results": [dataclasses.asdict(summary) for summary in summaries],
        "head_to_head": [
            {
                "head": pair.label,
                "against": pair.against,
                "prompts": pair.accept_length.num_prompts,
                "accept_length": ratio(pair.accept_length),
                "tokens_per_s": ratio(pair.tokens_per_s),
            }
            for pair in pairs
        ],
        "trainings": {path: dataclasses.asdict(training) for path, training in (trainings or {}).items()},
        "projection": None,
        "warnings": list(warnings),
    }
    if projected:
        profile, rows = projected
        named = {"profile": profile.path, "device": profile.device, "shape": profile.shape, "dtype": profile.dtype}
        content["projection"] = {**named, "assumed": ASSUMED, "results": [dataclasses.asdict(row) for row in rows]}
    if published:
        content["published"] = {
            "assumed": PUBLISHED_ASSUMED,
            "results": [dataclasses.asdict(row) for row in published],
        }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _doubts(summaries: Sequence[Summary]) -> list[str]:
    """What is doubtful about single results."""
    sentences = []
    for row in summaries:
        if row.parity_failed:
            sentences.append(f"parity failed ({row.parity} identical), speedup refused: {row.path}")
        elif row.speedup is not None and row.parity == "not checked":
            sentences.append(f"parity was not checked, the speedup rests on trust: {row.path}")
        if row.adapted and row.greedy_agreement is None:
            sentences.append(f"{row.label} changes the backbone; its speedup is over the original: {row.path}")
        elif row.adapted:
            share, tokens = 100 * row.greedy_agreement, 100 * row.token_agreement
            sentences.append(
                f"{row.label} changes the backbone: {share:.0f}% of its texts are the original's, {tokens:.1f}% of the "
                f"tokens up to the first difference; its speedup is over the original, parity with the changed one: "
                f"{row.path}"
            )
        if row.total_variation:
            sentences.append(
                f"{row.label} changes the distribution: its tokens are chosen {row.total_variation:.3f} away from a "
                f"draw (mean total variation): {row.path}"
            )
        if row.interrupted:
            sentences.append(f"interrupted after {row.prompts} of {row.num_prompts} prompts: {row.path}")
    return sentences


def check_target(target: str, sources: Sequence[str]) -> None:
    """Raises when ``target`` cannot be written, or would overwrite a result."""
    if Path(target).resolve() in {Path(source).resolve() for source in sources}:
        raise ValueError(f"{target}: is one of the results to compare; write elsewhere")
    check_writable(target)


def show_table(table: Table) -> None:
    """Print a table; into a file or a pipe at its full width, so that no cell is cut."""
    whole = None if sys.stdout.isatty() else 10_000  # columns; a table takes only what it needs
    Console(highlight=False, width=whole).print(table)


if __name__ == "__main__":
    sys.exit(main())
