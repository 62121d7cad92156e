"""What the kernels and a backbone pass cost on this machine.

    python bench/kernels.py --out kernels.json

Every figure is a median over repeats, in milliseconds, after a warm-up of the same shape. Run it on a quiet machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record.files import publish
from runtime.atomic import check_writable
from runtime.entry import Parser, run_entry
from runtime.options import add_options, option, read_options


@dataclass
class KernelOptions:
    """The options of this entry."""

    repeats: int = option(50, "timed calls", metavar="N", least=1)
    out: str | None = option(None, "write the JSON here too", metavar="FILE")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="bench/kernels.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_options(parser, KernelOptions)
    options = read_options(KernelOptions, parser.parse_args(arguments))
    if options.out:
        check_writable(options.out)
    from bench.clock.kernels import measure

    publish(measure(options.repeats), options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
