"""What a pass of the backbone engine costs by shape, rows and context, beside what this machine allows.

    python bench/engine.py --out results/engine.json --plot engine.png

Every pass is shown beside the bytes that it must read and the operations that it must do, and these beside the
bandwidth and the multiply-adds that small kernels reach in the same run. Then the decoding loop on the embedded
backbone: what it costs outside the kernels, and whether its timers add up. transformers runs beside ours if torch is
installed. Notes go to stderr; stdout gets tables and one line of JSON. Run it on a quiet machine.

    python bench/engine.py --shape 7b --no-loop --out results/engine-7b.json

On a GPU the weights of the random shapes are made on the device. The 7b shape and its cache take 16 GB, and 21 GB
have to be free; a shape that does not fit is refused before anything is built.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock.engine import EngineOptions, measure
from bench.record.files import publish
from runtime.entry import run_entry
from runtime.interrupt import deferred_interrupts
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_options(EngineOptions, "bench/engine.py", __doc__, arguments)
    from bench.peers.torch_llama import find_peer

    with deferred_interrupts():
        record = measure(options, find_peer)
    if options.plot:
        from bench.tables.plots.engine import draw_engine

        draw_engine(record, options.plot)
    from bench.tables.engine import show_engine

    show_engine(record)
    publish(record.model_dump(mode="json"), options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
