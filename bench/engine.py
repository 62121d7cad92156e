"""What a pass of the backbone engine costs by shape, rows and context, beside what this machine allows.

    python bench/engine.py --out results/engine.json --plot engine.png

Every pass stands beside the bytes that it must read and the operations that it must do, and these beside the bandwidth
and the multiply-adds that small kernels reach in the same run. Then the decoding loop on the embedded backbone: what it
costs outside the kernels, and whether its timers add up. transformers runs beside ours where torch is installed. Notes
go to stderr; stdout gets tables and one line of JSON. Run it on a quiet machine.

    python bench/engine.py --shape 7b --no-loop --out results/engine-7b.json

On a GPU the weights of the random shapes are made on the device. The 7b shape and its cache take 16 GB, and 21 GB
have to be free; a shape that does not fit is refused before anything is built.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from bench.clock.shapes import ITEM_BYTES, TINY, shape_config
from bench.measure.gauges import read_counts
from bench.record.schema import check_writable, write_atomically
from runtime.entry import Parser, run_entry
from runtime.interrupt import deferred_interrupts

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)
BUSY = 0.25  # processes per thread, over the last minute; kernels that wait for each other suffer most
DESCRIPTION = "What a pass of the backbone engine costs by shape, rows and context, beside what this machine allows."


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/engine.py", description=DESCRIPTION, allow_abbrev=False)

    def add(flag: str, help: str, **settings) -> None:
        default = settings.get("default")
        parser.add_argument(flag, help=help if default is None else f"{help} (default: %(default)s)", **settings)

    add("--shape", "tiny-vicuna, 110m, 1.1b or 7b; several are allowed (default: the first three)", nargs="+")
    add("--rows", "rows of a pass, several with commas", default="1,2,4,8,16,32,64", metavar="N,N")
    usual = "128,512,1024, and 128,1024,3968 where a shape has 4096 positions"
    add("--contexts", f"cached rows before a pass, several with commas (default: {usual})", metavar="N,N")
    add("--repeats", "figures of which the median and the quartiles count", type=int, default=9, metavar="N")
    add("--dtype", "of the weights and the cache", choices=tuple(ITEM_BYTES), default="float16")
    add("--tokens", "of the texts that are decoded on the embedded backbone", type=int, default=256, metavar="N")
    add("--steps", "passes of a long run that watches the memory; 0: none", type=int, default=0, metavar="N")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--no-loop", action="store_true", help="leave the decoding loop out")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    parser.add_argument("--plot", metavar="FILE", help="draw the passes and their roofline: .png, .pdf or .svg")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for unknown ones and for values that make no run."""
    options = build_parser().parse_args(arguments)
    options.shape = list(dict.fromkeys(options.shape or (TINY, "110m", "1.1b")))
    for name in options.shape:
        shape_config(name)
    options.rows = read_counts("--rows", options.rows)
    if options.contexts is not None:
        options.contexts = read_counts("--contexts", options.contexts)
    for name, least in (("repeats", 1), ("tokens", 2), ("steps", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.steps and options.no_loop:
        raise ValueError("--steps is a part of the decoding loop, which --no-loop leaves out; give one of them")
    return options


def note(text: str) -> None:
    """A line for the person at the terminal."""
    NOTES.print(text, markup=False)


def measure(options: argparse.Namespace):
    """The whole measurement, as a checked ``EngineRecord``. Raises ValueError for shapes that cannot be measured."""
    import runtime
    from bench.clock.engine_record import parse_engine_record
    from bench.clock.loop import measure_loop
    from bench.clock.machine import best
    from bench.clock.passes import Work, check_shapes, describe, time_shape
    from ops.machine import num_threads

    work = Work(
        options.rows, options.contexts, options.repeats, options.dtype, options.tokens, not options.no_transformers
    )
    notes = check_shapes(options.shape, work)
    timed, threads, load = [], num_threads(), os.getloadavg()[0]
    cores = threads if runtime.device == "cpu" else len(os.sched_getaffinity(0))  # on a GPU the host's still launch
    if load > BUSY * cores:
        notes.append(f"the machine was busy: {load:.1f} processes ran on {cores} cores before this one began")
    note(f"machine   {runtime.provenance()['device_name']}, {threads} threads or multiprocessors")
    for name in options.shape:
        note(f"shape     {name}, {options.dtype}, {options.repeats} repeats")
        timed.append(time_shape(name, work, threads, notes))
    loop = None
    if not options.no_loop:
        note(f"loop      {options.tokens} tokens with and without a tree")
        loop = measure_loop(options.dtype, options.tokens, options.repeats, options.steps)
    notes = list(dict.fromkeys(notes))
    for line in notes:
        note(f"note: {line}")
    return parse_engine_record(
        {
            "schema_version": 1,
            "kind": "engine",
            "provenance": runtime.provenance(0),
            "device": runtime.device,
            "repeats": options.repeats,
            "machine": best(each.readings for each in timed).model_dump(mode="json"),
            "shapes": [describe(each, work).model_dump(mode="json") for each in timed],
            "loop": None if loop is None else loop.model_dump(mode="json"),
            "notes": notes,
        },
        options.out or "the measurement",
    )


def pass_table(shape) -> Table:
    """The passes of a shape, a line each."""
    title = f"{shape.name}, {shape.dtype}, {shape.weight_bytes / 1e6:.0f} MB of weights"
    table = Table(title=title + (", fits in the cache" if shape.fits_in_cache else ""), title_justify="left")
    for column in ("rows", "context", "ms", "quartiles", "GB/s", "of memory", "GFLOP/s", "of peak", "roofline ms"):
        table.add_column(column, justify="right")
    for each in shape.passes:
        table.add_row(
            str(each.rows),
            str(each.context),
            f"{each.ms:.3f}",
            f"{each.ms_low:.3f} to {each.ms_high:.3f}",
            f"{each.bytes / each.ms / 1e6:.1f}",
            f"{100 * each.bandwidth_share:.0f}%",
            f"{each.flops / each.ms / 1e6:.1f}",
            f"{100 * each.peak_share:.0f}%",
            f"{each.roofline_ms:.3f}",
        )
    return table


def summary_lines(record) -> list[str]:
    """What the tables do not hold, a line each."""
    m, workers = record.machine, "threads" if record.device == "cpu" else "multiprocessors"
    cache = "" if m.cache_read_gb_s is None else f", {m.cache_read_gb_s:.1f} from the cache"
    lines = [
        f"machine, at best: reads {m.read_gb_s:.1f} GB/s{cache}, copies {m.copy_gb_s:.1f} GB/s, "
        f"multiplies {m.fma_gflop_s:.0f} GFLOP/s, {m.threads} {workers}"
    ]
    if m.mma_tflop_s is not None:
        lines.append(
            f"machine, at best: multiplies halves at {m.mma_tflop_s:.0f} TFLOP/s; a launch takes the host "
            f"{m.launch_host_us:.1f} us, the device {m.launch_device_us:.1f} us"
        )
    for shape in record.shapes:
        memory, peer, matrix, bounds = shape.memory, shape.transformers, shape.largest_matrix, shape.bounds
        lines.append(
            f"{shape.name}: meanwhile the memory gave {bounds.read_gb_s:.1f} GB/s and the multiply-adds "
            f"{bounds.fma_gflop_s:.0f} GFLOP/s"
        )
        products = ", ".join(f"{each.rows}: {each.ms:.3f}" for each in shape.linear)
        lines.append(f"{shape.name}: {matrix.name} {matrix.num_out} x {matrix.num_in}, ms by rows: {products}")
        lines += floor_lines(shape) + host_lines(shape)
        if memory.ratio is not None:
            held = (memory.weight_bytes + memory.cache_bytes) / 1e6
            text = f"{shape.name}: memory grew by {memory.ratio:.2f} of weights and cache ({held:.0f} MB)"
            if memory.host_growth_bytes is not None:
                text += f" on the device, on the host by {memory.host_growth_bytes / 1e6:.0f} MB"
            lines.append(text)
        if peer:
            unit = "token" if peer.what == "generate" else "pass of one row"
            lines.append(
                f"{shape.name}: {peer.ours.ms:.3f} ms a {unit}, transformers in {peer.dtype} {peer.theirs.ms:.3f}: "
                f"{peer.speedup:.2f} times"
            )
    if record.loop:
        lines += loop_lines(record.loop)
    return lines


def floor_lines(shape) -> list[str]:
    """By context: a one-row pass over the least that reading its bytes once takes, and the most rows over one."""
    lines = []
    for context in sorted({each.context for each in shape.passes}):
        found = {each.rows: each for each in shape.passes if each.context == context}
        if 1 not in found:
            continue
        one, most = found[1], max(found)
        text = f"{shape.name} behind {context}: one row takes {1 / one.bandwidth_share:.2f} of reading its bytes once"
        lines.append(text + (f", {most} rows {found[most].ms / one.ms:.2f} of one" if most > 1 else ""))
    return lines


def host_lines(shape) -> list[str]:
    """How long the host takes to hand a pass to the device, and whether that shows."""
    return [
        f"{shape.name}, {each.rows} rows: the call returns after {each.call.ms:.3f} ms, queued passes take "
        f"{each.queued.ms:.3f} ms each: the host is {'hidden' if each.hidden else 'the slower one'}, "
        f"{100 * each.share:.1f}% of a lone pass waits for it"
        for each in shape.host
    ]


def loop_lines(loop) -> list[str]:
    """The decoding loop, a line each."""
    lines = [f"loop: a pass with nothing to compute takes {loop.empty_pass.ms:.3f} ms"]
    for stage in (loop.autoregressive, loop.tree):
        lines.append(
            f"loop, {stage.nodes} node(s): {stage.step_ms:.3f} ms a step, {stage.outside_ms:.3f} outside the kernels "
            f"(host {stage.host_ms:.3f}, accept {stage.accept_ms:.3f}, cache {stage.cache_ms:.3f}); the stages miss "
            f"{stage.wall_gap_percent:.2f}% of the wall clock"
        )
    if loop.soak:
        soak = loop.soak
        sizes = ", ".join(f"{size / 1e6:.1f}" for size in (soak.start_bytes, soak.middle_bytes, soak.end_bytes))
        lines.append(f"soak: {soak.steps} steps, {soak.texts} texts; MB at start, middle and end: {sizes}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    options = parse(arguments)
    if options.plot:
        from bench.tables.plots import check_plot_path

        check_plot_path(options.plot)
    for path in filter(None, (options.out, options.plot)):
        check_writable(path)
    with deferred_interrupts():
        record = measure(options)
    plain = record.model_dump(mode="json")
    if options.out:
        write_atomically(options.out, json.dumps(plain, indent=1) + "\n")
    if options.plot:
        from bench.tables.engine_plot import draw_engine

        draw_engine(record, options.plot)
    from bench.compare import show_table

    console = Console(highlight=False, soft_wrap=True)
    for shape in record.shapes:
        show_table(pass_table(shape))
    for line in summary_lines(record):
        console.print(line, markup=False)
    print(json.dumps(plain))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
