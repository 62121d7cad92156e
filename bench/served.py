"""Serve exported heads by vLLM and compare what it accepts with what ours accepts, on the same prompts in float32.

    python bench/served.py --python vllm/bin/python --checkpoint runs/mlp/RUN --num-prompts 20 --out results/served.json

A head is exported to each format that holds it and vLLM reads (docs/SERVING.md), and drafts a chain on both sides.
Prints a table and, as the last line, the JSON. The status is 0 if every text and every pass is the same, else 1.
vLLM needs an environment of its own; docs/SERVING.md says how to make one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers.served import ServedOptions, measure_served
from bench.record.files import publish
from bench.tables.engines import show_served
from runtime.atomic import check_writable
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 1 if a text or a pass differs."""
    options = parse_options(ServedOptions, "bench/served.py", __doc__, arguments, ServedOptions.SHOWN)
    prompts = options.read_prompts()
    if options.out:
        check_writable(options.out)
    record = measure_served(options, prompts)
    show_served(record)
    publish(record, options.out)
    found = [each["agreement"] for each in record["served"]]
    return 0 if all(f["texts"] == f["same_texts"] and f["passes"] == f["same_passes"] for f in found) else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
