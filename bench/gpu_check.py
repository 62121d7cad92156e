"""Everything that a machine with a GPU is checked by, in one command, ending in a table of pass, fail and figures.

    python bench/gpu_check.py                       # or: make gpu-check
    python bench/gpu_check.py --only doctor engine-7b
    python bench/gpu_check.py --budget-minutes 9 --continue     # repeatedly, where a command may not take longer

Every step is a separate process with a log and a time limit; a failing step does not stop the others. Without a usable
CUDA device the steps that need one are listed and not run, which is a failure unless ``--allow-no-gpu`` is given. The
table comes last; the same goes as JSON, with GPU, driver and CUDA, to results/gpu-check.json.
Exit status: 0 if nothing failed and every step ran or was skipped on purpose, else 1; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu.check import CheckOptions, run_check
from bench.gpu.step import Step
from bench.gpu.steps import STEPS
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str], steps: Sequence[Step] = STEPS) -> int:
    """The command line. steps: all that there are."""
    options = parse_options(CheckOptions, "bench/gpu_check.py", __doc__, arguments)
    return run_check(options, steps, arguments)


if __name__ == "__main__":
    sys.exit(run_entry(main))
