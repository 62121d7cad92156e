"""A run of ``bench/run.py``: every head beside autoregressive decoding of the same prompts, one result file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backbone.engines import prepare_engine
from bench.measure.options import RunOptions
from bench.measure.tree_choice import read_tree_file
from bench.record.metrics import total_variation
from bench.record.prompts import PromptSet
from bench.record.schema import AUTOREGRESSIVE, Quantization, Record
from bench.tables.terminal import note, progress_bar
from decoding.options import DEFAULT_NODES, check_room, describe_acceptance, parse_tree
from decoding.tree import DynamicTree, Tree
from runtime.atomic import check_writable
from runtime.entry import INTERRUPTED

if TYPE_CHECKING:
    from bench.measure.attempts import Setup
    from bench.measure.heads import LoadedHead
    from bench.measure.side_by_side import Measurement


def run(options: RunOptions) -> int:
    """The complete run. Returns the exit status: 0, or 130 if Ctrl-C ended it early, with what was measured written.

    Raises ValueError for options that do not fit the backbone or the heads, and OSError for a result that cannot be
    written, before anything is measured.
    """
    prepare_engine(options.backbone_engine)
    acceptance = options.acceptance(options.seed)
    tree = parse_tree(options.tree, read_tree_file) if options.tree else None
    prompts = options.read_prompts(options.seed)
    check_writable(options.output_path(AUTOREGRESSIVE))
    config, tokenizer = read_backbone(options)
    nodes = tree.num_nodes if isinstance(tree, Tree) else options.nodes or DEFAULT_NODES
    cache_length = options.cache_rows(config.max_positions, nodes)

    import runtime
    from bench.measure.attempts import Setup
    from bench.measure.heads import find_heads, load_heads

    found = find_heads(options)
    backbone = options.load()
    runtime.set_seed(options.seed)
    heads = load_heads(options, found, backbone, tokenizer, tree)
    check_room(max((each.tree.num_nodes for each in heads), default=1), cache_length)
    setup = Setup(
        backbone,
        tokenizer,
        backbone.new_cache(cache_length),
        options.max_new_tokens,
        options.repeats,
        acceptance,
        options.batch_size,
        draft_dtype=options.draft_dtype,
    )
    show_card(options, setup, heads, prompts)
    quantization = measure_quantization(options, setup, prompts) if backbone.quantized else None
    written, interrupted = measure_all(options, setup, heads, prompts, quantization)
    show(written)
    return INTERRUPTED if interrupted else 0


def read_backbone(options):
    """(config, tokenizer) of the backbone of some ``BackboneOptions``, before its weights are loaded. Raises ValueError
    if they do not fit each other."""
    from backbone.config import read_config
    from backbone.tokenizer import EMBEDDED

    config, tokenizer = read_config(options.backbone or EMBEDDED), options.load_tokenizer()
    tokenizer.check_fits(config)
    return config, tokenizer


def show(written: Sequence[Path]) -> None:
    """Print a table of the results, and each as one line of JSON."""
    if not written:
        return
    from bench.tables.comparison import show_results
    from bench.tables.results import load_results

    show_results(load_results(written))
    for path in written:
        print(Record.read(path).to_json())


def show_card(options: RunOptions, setup: Setup, heads: Sequence[LoadedHead], prompts: PromptSet) -> None:
    """Five lines before the work: device, backbone, heads, prompts, decoding."""
    import runtime

    c, backbone = setup.backbone.config, setup.backbone
    named = [f"{t.name} ({t.head.num_parameters / 1e6:.2f} M, {t.head.num_depths} depths)" for t in heads]
    nodes = "/".join(dict.fromkeys(str(t.tree.num_nodes) for t in heads)) or "1"
    shape = f"{'up to ' if any(isinstance(t.tree, DynamicTree) for t in heads) else ''}{nodes} nodes"
    batch = f", {setup.batch_size} prompts at once" if setup.batch_size > 1 else ""
    note(f"device    {runtime.device} ({runtime.device_reason})")
    note(
        f"backbone  {options.backbone or 'embedded tiny-vicuna'} {backbone.fingerprint}, {c.num_layers} layers, "
        f"{c.hidden_size} wide, {backbone.storage}"
    )
    note(f"head      {', '.join(named) or 'none: autoregressive decoding alone'}")
    note(f"data      {options.prompt_source}, {len(prompts.prompts)} prompts")
    note(
        f"decoding  {describe_acceptance(setup.acceptance.fields())}, {shape}{batch}, at most {options.max_new_tokens} "
        f"new tokens a turn, cache of {setup.cache.max_length} rows, {options.repeats} repeat(s)"
    )


def measure_quantization(options: RunOptions, setup: Setup, prompts: PromptSet) -> Quantization:
    """What 8 or 4 bits change in the backbone, measured before anything is timed."""
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
    options: RunOptions,
    setup: Setup,
    heads: Sequence[LoadedHead],
    prompts: PromptSet,
    quantization: Quantization | None = None,
) -> tuple[list[Path], bool]:
    """Measure head after head and write each result at once; returns (paths, interrupted).

    The result of autoregressive decoding is what ran beside the first head. Raises ValueError if no prompt at all could
    be measured.
    """
    from bench.measure.recorder import Recorder
    from bench.measure.side_by_side import measure
    from bench.tables.training import describe_prediction

    recorder, written, interrupted = Recorder(options, setup, prompts, quantization), [], False
    all_prompts = options.num_prompts is None and not options.out
    with progress_bar() as progress:
        for each in heads or [None]:
            name = each.name if each else AUTOREGRESSIVE
            task = progress.add_task(name, total=len(prompts.prompts), note="")

            def show_prompt(measured: Measurement, task=task) -> None:
                passes = sum(row.passes for row in measured.rows)
                length = f"{sum(row.tokens for row in measured.rows) / passes:.2f} tokens a pass" if passes else ""
                progress.update(task, advance=1, note=length)

            own = {"head": each.head, "tree": each.tree} if each else {}
            measured = measure(dataclasses.replace(setup, **own), prompts.prompts, show_prompt)
            interrupted = measured.interrupted
            if not measured.baseline_rows and not interrupted:
                first = measured.failures[0]
                raise ValueError(f"no prompt could be measured; {first.prompt_id}: {first.error}")
            if measured.baseline_rows:
                if each is None or (all_prompts and each is heads[0] and not interrupted):
                    written.append(options.output_path(AUTOREGRESSIVE))
                    recorder.baseline(measured).write(written[-1])
                if each is not None:
                    written.append(options.output_path(name))
                    record = recorder.head(each, measured)
                    record.write(written[-1])
                    for line in describe_prediction(record):
                        note(line)
            report_doubts(name, measured)
            if interrupted:
                break
    return written, interrupted


def report_doubts(name: str, measured: Measurement) -> None:
    """Note what makes a result less than it seems."""
    if measured.failures:
        first = measured.failures[0]
        note(f"warning: {name}: {len(measured.failures)} prompt(s) failed; {first.prompt_id}: {first.error}")
    if measured.dropped_turns:
        note(f"note: {name}: {measured.dropped_turns} later turn(s) did not fit into the cache and were left out")
    if measured.rows and measured.parity and measured.parity.identical < measured.parity.prompts:
        parity = measured.parity
        note(f"warning: {name}: only {parity.identical} of {parity.prompts} prompts gave the baseline's tokens")
    adaptation = measured.adaptation({})
    if adaptation and adaptation.greedy_agreement is not None:
        same = f"{100 * adaptation.greedy_agreement:.0f}% of its greedy texts are the original's, "
        same += f"{100 * adaptation.token_agreement:.1f}% of the tokens up to the first difference"
        note(f"note: {name} changes the backbone: {same}")
    distance = total_variation(measured.rows)
    if distance is not None:
        note(f"note: {name}: the choice of its tokens is {distance:.3f} away from sampling (mean total variation)")
    if measured.late_kernels:
        note(f"warning: {name}: {measured.late_kernels} kernel(s) were first used on the clock; run it again")
    if measured.interrupted:
        note(f"interrupted: {name} after {len(measured.baseline_rows)} prompts")
