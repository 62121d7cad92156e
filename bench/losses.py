"""What a training loss over large vocabularies takes: all logits of all heads at once, or a chunk of rows at a time.

    python bench/losses.py --heads 5 --vocab 32000 --width 4096 --positions 2048 --shared --repeats 0

Each side runs in a separate process that records its peak memory. Then both are timed in turns in one process,
``--repeats`` times; 0 leaves that out. Run it on a quiet machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock.losses import LossOptions, compare
from bench.record.files import publish
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_options(LossOptions, "bench/losses.py", __doc__, arguments)
    publish(compare(options.problem, options.repeats), options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
