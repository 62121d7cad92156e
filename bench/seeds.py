"""Compare head architectures over several training seeds: what a head accepts, and how much of it was luck.

    python train.py --head mlp --seed 1 --out runs/seeds/mlp-1      # and so on, for every head and seed
    python bench/run.py --greedy --checkpoint runs/seeds/mlp-1 --out results/seeds/mlp-1.json
    python bench/seeds.py results/seeds/*.json --against mlp

Results of one head with one set of options are told apart by the seed their checkpoint was trained with. Intervals are
over seeds and prompts. All figures are of the prompts that count in every result given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables.seeds_report import SeedsOptions, compare_seeds
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    compare_seeds(parse_options(SeedsOptions, "bench/seeds.py", __doc__, arguments))


if __name__ == "__main__":
    sys.exit(run_entry(main))
