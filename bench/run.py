"""Measure heads against autoregressive decoding of the same prompts, and write one result file per head.

    python bench/run.py --greedy

Without --head or --checkpoint every head with a checkpoint under --runs is measured, and every head that needs none
(except with --out, which takes one head). Each result goes to <out-dir>/<head>.json, that of autoregressive decoding to
<out-dir>/autoregressive.json if the complete prompt file was used. Progress is shown on stderr; stdout gets a table and
one line of JSON per result, the last head's at the end. Ctrl-C ends the run early, with what was measured written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure.options import RunOptions
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    options = parse_options(RunOptions, "bench/run.py", __doc__, arguments)
    from bench.measure.session import run  # late: pandas, which --help does not need

    return run(options)


if __name__ == "__main__":
    sys.exit(run_entry(main))
