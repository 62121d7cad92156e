"""Compare results on one table: who accepts more, who is faster, and whether the comparison is fair.

    python bench/compare.py results/*.json --plot comparison.png --frontier frontier.png
    python bench/compare.py results/*.json runs/*/*/train.json
    python bench/compare.py --profile results/engine-7b.json --published

Differences in device, dtype, backbone, prompts, tree budget or acceptance are warned about on stderr; a result whose
parity check failed gets no speedup. From two results on, paired bootstrap intervals tell whether a ratio differs
from 1. Train records, anywhere among the files, add what training expected.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables.comparison import CompareOptions, compare
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    compare(parse_options(CompareOptions, "bench/compare.py", __doc__, arguments))


if __name__ == "__main__":
    sys.exit(run_entry(main))
