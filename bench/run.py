"""Measure trained heads against autoregressive decoding of the same prompts, and write one result file per head.

    python bench/run.py --greedy

Without --head or --checkpoint every head with a checkpoint under --runs is measured, and for the floor every head that
needs none (not with --out, which takes one head). Each result goes to <out-dir>/<head>.json, that of autoregressive
decoding to <out-dir>/autoregressive.json when the whole prompt file was used. Progress is shown on stderr; stdout gets
a table and one line of JSON per result, the last head's at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from backbone.engines import prepare_engine
from bench.measure.options import (
    DEFAULT_CACHE,
    DEFAULT_NODES,
    output_path,
    parse,
    read_prompts,
)
from bench.measure.recorder import Recorder, Trained, read_stats, source
from bench.measure.rules import describe, read_acceptance
from bench.measure.trees import check_room, choose_tree, describe_prediction, parse_tree
from bench.record.metrics import total_variation
from bench.record.prompts import PromptSet
from bench.record.schema import Quantization, check_writable, read_record, to_json, write_record
from bench.tables.summary import AUTOREGRESSIVE, load_results, summarise
from decoding.tree import DynamicTree, Tree
from runtime.entry import INTERRUPTED, run_entry

if TYPE_CHECKING:
    from bench.measure.attempts import Setup
    from bench.measure.measure import Measurement

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)


def fresh_config(name: str) -> dict:
    """What a checkpoint's config would say of a head that needs none: its default options, and no tree."""
    from heads.registry import make_config

    return {"head": name, "head_config": vars(make_config(name, {})), "backbone": {}}


def find_trained(options: argparse.Namespace) -> list[tuple[Path | None, dict]]:
    """Directory and config of each checkpoint that was asked for, else of the latest of each head and, unless there
    is --out, of each head that needs none. The directory of a head that needs none and has none is None.

    Raises ValueError for an unknown head, a head without the checkpoint it needs, a directory that holds none, and
    heads whose results would overwrite each other; OSError when a result could not be written.
    """
    from heads.checkpoint import find_checkpoint, latest_checkpoints, read_config
    from heads.registry import available, head_class

    latest = latest_checkpoints(Path(options.runs))
    directories, fresh = [find_checkpoint(directory) for directory in options.checkpoint or []], []
    for name in dict.fromkeys(options.head or []):
        needs_one = head_class(name).trained
        if name in latest:
            directories.append(latest[name])
        elif not needs_one:
            fresh.append((None, fresh_config(name)))
        else:
            raise ValueError(
                f"head {name!r} is not trained: nothing in {options.runs}; run python train.py --head {name}"
            )
    if directories or fresh:
        found = [(directory, read_config(directory)) for directory in dict.fromkeys(directories)] + fresh
        names = [config["head"] for _, config in found]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated:
            raise ValueError(f"two checkpoints of {repeated} would both be written to {output_path(options, repeated)}")
    else:
        found = []
        for name, directory in latest.items():
            config = read_config(directory)
            if config["head"] == name:
                found.append((directory, config))
            else:
                note(f"passed over {directory}: it holds the head {config['head']}; pass it as --checkpoint")
        for name in [] if options.out else sorted({*available()} - {config["head"] for _, config in found}):
            try:
                needs_one = head_class(name).trained
            except ValueError as error:
                note(f"passed over {name}: {error}")
                continue
            if not needs_one:
                found.append((None, fresh_config(name)))
    for _, config in found:
        check_writable(output_path(options, config["head"]))
    return found


def load_trained(
    options: argparse.Namespace, found: Sequence[tuple[Path | None, dict]], backbone, tokenizer, tree: Tree | str | None
) -> list[Trained]:
    """The heads that were found, loaded, each with its tree. tree: what --tree says.

    A head of another backbone is passed over unless it was asked for; one that needs no checkpoint does without it.
    Raises ValueError for a checkpoint that does not fit the backbone or the tree, and for several heads with --out.
    """
    from decoding.dynamic import check_shape
    from heads.checkpoint import load_head
    from heads.registry import available, build, head_class

    trained = []
    for directory, config in found:
        name, trained_on = config["head"], config["backbone"].get("fingerprint")
        if directory and trained_on != backbone.fingerprint and not options.checkpoint:
            if not head_class(name).trained:
                note(f"passed over {directory}: it is of another backbone; {name} is measured with its defaults")
                directory, config = None, fresh_config(name)
            elif not options.head:
                note(f"passed over {directory}: it was trained on another backbone")
                continue
        head = load_head(directory, backbone)[0] if directory else build(name, config["head_config"], backbone)
        head.eval()
        nodes, least = options.nodes or DEFAULT_NODES, options.min_confidence or 0.0
        own = choose_tree(tree, nodes, directory, config, head, options.runs, note, least)
        check_shape(own.tree, head)
        if directory and config.get("tokenizer", {}).get("fingerprint") != tokenizer.fingerprint:
            note(f"warning: {name} was trained with another tokenizer or chat template; it will draft worse")
        trained.append(Trained(name, directory, config, head, own, output_path(options, name)))
    if options.out and len(trained) > 1:
        raise ValueError(f"--out takes one head, there are {', '.join(t.name for t in trained)}; use --out-dir")
    if not any(each.head.trained for each in trained) and not (options.head or options.checkpoint):
        names = ", ".join(each.name for each in trained)
        note(f"no trained head under {options.runs}: {names or 'autoregressive decoding'} is measured alone")
        note(f"train one with python train.py --head NAME, where NAME is one of {', '.join(available())}")
    return trained


def note(text: str) -> None:
    """A line for the person at the terminal."""
    NOTES.print(text, markup=False)


def card(options: argparse.Namespace, setup: Setup, trained: Sequence[Trained], prompts: PromptSet) -> None:
    """Five lines before the work: device, backbone, heads, prompts, decoding."""
    import runtime

    c, backbone = setup.backbone.config, setup.backbone
    heads = [f"{t.name} ({t.head.num_parameters / 1e6:.2f} M, {t.head.num_depths} depths)" for t in trained]
    nodes = "/".join(dict.fromkeys(str(t.tree.num_nodes) for t in trained)) or "1"
    shape = f"{'up to ' if any(isinstance(t.tree, DynamicTree) for t in trained) else ''}{nodes} nodes"
    batch = f", {setup.batch_size} prompts at once" if setup.batch_size > 1 else ""
    note(f"device    {runtime.device} ({runtime.device_reason})")
    note(
        f"backbone  {options.backbone or 'embedded tiny-vicuna'} {backbone.fingerprint}, {c.num_layers} layers, "
        f"{c.hidden_size} wide, {backbone.storage}"
    )
    note(f"head      {', '.join(heads) or 'none: autoregressive decoding alone'}")
    note(f"data      {source(options)}, {len(prompts.prompts)} prompts")
    note(
        f"decoding  {describe(setup.acceptance.fields())}, {shape}{batch}, at most {options.max_new_tokens} new "
        f"tokens a turn, cache of {setup.cache.max_length} rows, {options.repeats} repeat(s)"
    )


def quantize_report(options: argparse.Namespace, setup: Setup, prompts: PromptSet) -> Quantization:
    """What 8 or 4 bits did to the backbone, measured before anything is timed."""
    from backbone.model import load_backbone
    from bench.measure.quantization import compare_backbones

    original = load_backbone(options.backbone, options.dtype)
    found = compare_backbones(dataclasses.replace(setup, backbone=original), setup, prompts.prompts)
    note(
        f"{found.bits} bits    layers take {found.layer_bytes_after / found.layer_bytes_before:.2f} of their bytes; "
        f"perplexity {found.perplexity_before:.4f} to {found.perplexity_after:.4f}; "
        f"{found.greedy_agreement or 0:.0%} of the first replies are the original's, "
        f"{found.token_agreement or 0:.0%} of their tokens up to the first difference"
    )
    return found


def measure_all(
    options: argparse.Namespace,
    setup: Setup,
    trained: Sequence[Trained],
    prompts: PromptSet,
    quantization: Quantization | None = None,
) -> tuple[list[Path], bool]:
    """Measure head after head and write each result as soon as it is there; returns (paths, interrupted).

    The result of autoregressive decoding is what ran beside the first head. Raises ValueError for a checkpoint with
    unusable stats, before anything is measured, and when no prompt at all could be measured.
    """
    from bench.measure.measure import measure

    for each in trained:
        read_stats(each.config, each.name)
    recorder, written, interrupted = Recorder(options, setup, prompts, quantization), [], False
    whole = options.num_prompts is None and not options.out
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    columns += (TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=NOTES, disable=not sys.stderr.isatty()) as progress:
        for each in trained or [None]:
            name = each.name if each else AUTOREGRESSIVE
            task = progress.add_task(name, total=len(prompts.prompts), note="")

            def show(measured: Measurement, task=task) -> None:
                passes = sum(row.passes for row in measured.rows)
                length = f"{sum(row.tokens for row in measured.rows) / passes:.2f} tokens a pass" if passes else ""
                progress.update(task, advance=1, note=length)

            own = {"head": each.head, "tree": each.tree} if each else {}
            measured = measure(dataclasses.replace(setup, **own), prompts.prompts, show)
            interrupted = measured.interrupted
            if not measured.baseline_rows and not interrupted:
                first = measured.failures[0]
                raise ValueError(f"no prompt could be measured; {first.prompt_id}: {first.error}")
            if measured.baseline_rows:
                if each is None or (whole and each is trained[0] and not interrupted):
                    written.append(output_path(options, AUTOREGRESSIVE))
                    write_record(recorder.baseline(measured), written[-1])
                if each is not None:
                    written.append(each.out)
                    record = recorder.head(each, measured)
                    write_record(record, written[-1])
                    for line in describe_prediction(record):
                        note(line)
            report_doubts(name, measured)
            if interrupted:
                break
    return written, interrupted


def report_doubts(name: str, measured: Measurement) -> None:
    """Say what makes a result less than it seems."""
    if measured.failures:
        first = measured.failures[0]
        note(f"warning: {name}: {len(measured.failures)} prompt(s) failed; {first.prompt_id}: {first.error}")
    if measured.dropped_turns:
        note(f"note: {name}: {measured.dropped_turns} later turn(s) did not fit into the cache and were left out")
    if measured.rows and measured.parity and measured.parity.identical < measured.parity.prompts:
        parity = measured.parity
        note(f"warning: {name}: only {parity.identical} of {parity.prompts} prompts gave the tokens of its twin")
    adaptation = measured.adaptation({})
    if adaptation and adaptation.greedy_agreement is not None:
        same = f"{100 * adaptation.greedy_agreement:.0f}% of its greedy texts are the original's, "
        same += f"{100 * adaptation.token_agreement:.1f}% of the tokens up to the first difference"
        note(f"note: {name} changes the backbone: {same}")
    distance = total_variation(measured.rows)
    if distance is not None:
        note(f"note: {name}: its tokens are chosen {distance:.3f} away from a draw (mean total variation)")
    if measured.late_kernels:
        note(f"warning: {name}: {measured.late_kernels} kernel(s) were first used on the clock; run it once more")
    if measured.interrupted:
        note(f"interrupted: {name} after {len(measured.baseline_rows)} prompts")


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 130 when Ctrl-C ended the run early (what was measured is kept)."""
    options = parse(arguments)
    prepare_engine(options.backbone_engine)
    acceptance = read_acceptance(options)
    tree = parse_tree(options.tree) if options.tree else None
    prompts = read_prompts(options)
    check_writable(output_path(options, AUTOREGRESSIVE))

    from backbone.config import read_config
    from backbone.tokenizer import EMBEDDED, load_tokenizer

    config = read_config(options.backbone or EMBEDDED)
    tokenizer = load_tokenizer(options.backbone, options.template)
    tokenizer.check_fits(config)
    cache_length = options.cache_length or min(config.max_positions, DEFAULT_CACHE)
    nodes = tree.num_nodes if isinstance(tree, Tree) else options.nodes or DEFAULT_NODES
    if cache_length > config.max_positions:
        raise ValueError(f"--cache-length {cache_length} exceeds the {config.max_positions} positions of the backbone")
    check_room(nodes, cache_length)

    import runtime
    from backbone.engines import load_engine
    from bench.compare import show_table, summary_table
    from bench.measure.attempts import Setup

    found = find_trained(options)
    kept = options.load_in_8bit, options.load_in_4bit
    backbone = load_engine(options.backbone_engine, options.backbone, options.dtype, *kept)
    runtime.set_seed(options.seed)
    trained = load_trained(options, found, backbone, tokenizer, tree)
    check_room(max((each.tree.num_nodes for each in trained), default=1), cache_length)
    cache = backbone.new_cache(cache_length)
    sizes = options.max_new_tokens, options.repeats
    setup = Setup(backbone, tokenizer, cache, *sizes, acceptance, options.batch_size, draft_dtype=options.draft_dtype)
    card(options, setup, trained, prompts)
    quantization = quantize_report(options, setup, prompts) if backbone.quantized else None
    written, interrupted = measure_all(options, setup, trained, prompts, quantization)
    if written:
        results, _ = load_results([str(path) for path in written])
        show_table(summary_table([summarise(result) for result in results]))
    for path in written:
        print(to_json(read_record(path)))
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
