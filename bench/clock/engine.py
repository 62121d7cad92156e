"""The measurement of ``bench/engine.py``: shapes one after another, then the decoding loop."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bench.clock.shapes import ITEM_BYTES, TINY, shape_config
from bench.clock.timing import busy_note, read_counts
from bench.record.engine import EngineRecord
from bench.tables.plots.figure import check_plot_path
from bench.tables.terminal import note
from runtime.atomic import check_writable
from runtime.options import option

USUAL_SHAPES = (TINY, "110m", "1.1b")


@dataclass
class EngineOptions:
    """The options of bench/engine.py."""

    shape: list[str] = option(
        [], "tiny-vicuna, 110m, 1.1b or 7b; several are allowed (default: the first three)", metavar="SHAPE"
    )
    rows: str = option("1,2,4,8,16,32,64", "rows of a pass, separated by commas", metavar="N,N")
    contexts: str | None = option(
        None,
        "cached rows before a pass, separated by commas (default: 128,512,1024, and 128,1024,3968 for a shape of 4096 "
        "positions)",
        metavar="N,N",
    )
    repeats: int = option(9, "figures of which the median and the quartiles count", metavar="N", least=1)
    dtype: str = option("float16", "of the weights and the cache", choices=tuple(ITEM_BYTES))
    tokens: int = option(256, "of the texts that are decoded on the embedded backbone", metavar="N", least=2)
    steps: int = option(0, "passes of a long run that watches the memory; 0: none", metavar="N", least=0)
    no_transformers: bool = option(False, "leave transformers out")
    no_loop: bool = option(False, "leave the decoding loop out")
    out: str | None = option(None, "write the JSON here too", metavar="FILE")
    plot: str | None = option(None, "draw the passes and their roofline: .png, .pdf or .svg", metavar="FILE")

    @property
    def shapes(self) -> list[str]:
        """The shapes to measure, each once."""
        return list(dict.fromkeys(self.shape or USUAL_SHAPES))

    @property
    def row_counts(self) -> list[int]:
        """The rows of a pass. Raises ValueError for anything but whole numbers from 1."""
        return read_counts("--rows", self.rows)

    @property
    def context_counts(self) -> list[int] | None:
        """The cached rows before a pass; None for the shapes' usual ones. Raises as ``row_counts``."""
        return None if self.contexts is None else read_counts("--contexts", self.contexts)

    def check(self) -> None:
        """Raises ValueError for an unknown shape, for counts that are none, for options that exclude each other and for
        a plot's ending, and OSError for a file that cannot be written."""
        for name in self.shapes:
            shape_config(name)
        self.row_counts, self.context_counts  # noqa: B018  raise ValueError
        if self.steps and self.no_loop:
            raise ValueError("--steps is part of the decoding loop, which --no-loop leaves out; give one of them")
        if self.plot:
            check_plot_path(self.plot)
        for path in filter(None, (self.out, self.plot)):
            check_writable(path)


def measure(options: EngineOptions, find_peer) -> EngineRecord:
    """The complete measurement. find_peer: of ``bench.peers.torch_llama``, unless --no-transformers.

    Raises ValueError for shapes that cannot be measured.
    """
    import runtime
    from bench.clock.loop import measure_loop
    from bench.clock.machine import best
    from bench.clock.passes import Work, check_shapes, describe, time_shape
    from ops.machine import num_threads

    peer = None if options.no_transformers else find_peer
    work = Work(options.row_counts, options.context_counts, options.repeats, options.dtype, options.tokens, peer)
    notes, timed, threads = check_shapes(options.shapes, work), [], num_threads()
    notes += busy_note(threads if runtime.device == "cpu" else len(os.sched_getaffinity(0)))  # the host launches
    note(f"machine   {runtime.provenance()['device_name']}, {threads} threads or multiprocessors")
    for name in options.shapes:
        note(f"shape     {name}, {options.dtype}, {options.repeats} repeats")
        timed.append(time_shape(name, work, threads, notes))
    loop = None
    if not options.no_loop:
        note(f"loop      {options.tokens} tokens with and without a tree")
        loop = measure_loop(options.dtype, options.tokens, options.repeats, options.steps)
    notes = list(dict.fromkeys(notes))
    for line in notes:
        note(f"note: {line}")
    return EngineRecord(
        schema_version=EngineRecord.VERSION,
        kind=EngineRecord.KIND,
        provenance=runtime.provenance(0),
        device=runtime.device,
        repeats=options.repeats,
        machine=best(each.readings for each in timed),
        shapes=[describe(each, work) for each in timed],
        loop=loop,
        notes=notes,
    )
