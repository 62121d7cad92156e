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

from dataclasses import dataclass

from bench.clock.losses import Problem, compare
from bench.record.files import publish
from runtime.atomic import check_writable
from runtime.entry import Parser, run_entry
from runtime.options import add_options, option, read_options


@dataclass
class LossOptions:
    """The options of this entry besides the problem's."""

    repeats: int = option(20, "timed turns", metavar="N", least=0)
    out: str | None = option(None, "write the JSON here too", metavar="FILE")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="bench/losses.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_options(parser, Problem)
    add_options(parser, LossOptions)
    given = parser.parse_args(arguments)
    problem, options = read_options(Problem, given), read_options(LossOptions, given)
    if options.out:
        check_writable(options.out)
    publish(compare(problem, options.repeats), options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
