"""Find the tree that is fastest for a head on this machine, and store it for ``bench/run.py --tree auto``.

    python bench/calibrate.py --head gated_rnn

Without --prompts, the prompts are the users' turns of the held-out conversations of the embedded corpus. Progress is
shown on stderr; stdout gets a table and the calibration as one line of JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbone.engines import prepare_engine
from bench.measure.calibrate import OFFERED, CalibrateOptions, calibrate
from bench.tables.terminal import note
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_options(CalibrateOptions, "bench/calibrate.py", __doc__, arguments, OFFERED)
    prepare_engine(options.backbone_engine)
    calibration, out = calibrate(options)
    calibration.write(out)
    from bench.tables.calibration import show_calibration

    show_calibration(calibration)
    note(f"written to {out}")
    if calibration.best.depth == 0:
        note("no tree was faster than decoding token by token here; bench/run.py --tree auto will not draft")
    print(calibration.to_json())


if __name__ == "__main__":
    sys.exit(run_entry(main))
