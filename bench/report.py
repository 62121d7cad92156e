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

from bench.tables.report import ReportOptions, report
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    report(parse_options(ReportOptions, "bench/report.py", __doc__, arguments))


if __name__ == "__main__":
    sys.exit(run_entry(main))
