"""Write the table of results into Markdown, from the JSON files and nothing else.

    python bench/report.py results/*.json --out results/README.md --update README.md README_zh.md

A file ending in ``_zh.md`` gets the Chinese header. Every row names the JSON file that its numbers came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables.report import BEGIN, END, report
from runtime.entry import Parser, run_entry


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="bench/report.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULT", help="result files written by bench/run.py")
    add("--out", metavar="FILE", help="write a Markdown page with the table only")
    add("--update", nargs="+", default=[], metavar="FILE", help=f"replace the text between {BEGIN} and {END}")
    given = parser.parse_args(arguments)
    report(given.results, given.out, given.update)


if __name__ == "__main__":
    sys.exit(run_entry(main))
