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

from bench.tables.comparison import compare
from runtime.entry import Parser, run_entry


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="bench/compare.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("results", nargs="*", metavar="RESULT", help="result files of bench/run.py, and train.json")
    add("--plot", metavar="FILE", help="draw accept length and cost per pass into a .png, .pdf or .svg")
    add("--frontier", metavar="FILE", help="draw accept length against draft time into a .png, .pdf or .svg")
    add("--sort", metavar="COLUMN", help="sort the table by a column, the best value first")
    add("--json", metavar="FILE", help="write the comparison as JSON")
    add("--head-to-head", nargs=2, metavar=("A", "B"), help="give the ratios A / B only (heads or files)")
    add("--profile", metavar="FILE", help="a result of bench/engine.py: project the results onto that machine")
    add("--profile-shape", metavar="NAME", help="shape of the profile (default: its first)")
    add("--published", action="store_true", help="project published results onto the profile's 7b shape too")
    given = parser.parse_args(arguments)
    compare(
        given.results,
        plot=given.plot,
        frontier=given.frontier,
        sort=given.sort,
        json_path=given.json,
        pair=given.head_to_head,
        profile=given.profile,
        profile_shape=given.profile_shape,
        published=given.published,
    )


if __name__ == "__main__":
    sys.exit(run_entry(main))
