"""Compare our engine with transformers on torch: the same checkpoint, the same prompts, greedily, in one process.

    python bench/hybrid.py --checkpoint runs/mlp/RUN --out results/hybrid.json

Prints a table and, as the last line, the JSON. The status is 0 if every text is the same with both engines, with the
head and without, and 1 if one differs; in float32 a difference means that one of them is wrong, or that two logits
lie closer than their rounding (the JSON says how close). Needs requirements-torch.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbone.engines import TORCH, prepare_engine
from bench.measure.engines import HybridOptions, compare_engines
from bench.record.files import publish
from bench.tables.terminal import note
from runtime.atomic import check_writable
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 1 if a text differs between the engines."""
    options = parse_options(HybridOptions, "bench/hybrid.py", __doc__, arguments, HybridOptions.SHOWN)
    prepare_engine(TORCH)
    prompts = options.read_prompts()
    if options.out:
        check_writable(options.out)
    record = compare_engines(options, prompts)
    from bench.tables.engines import show_engines

    show_engines(record)
    found = record["agreement"]
    note(
        f"the same with both engines, of {found['prompts']} prompts: {found['autoregressive']} texts without the head, "
        f"{found['head']} with it, {found['passes']} pass by pass"
    )
    publish(record, options.out)
    return 0 if found["autoregressive"] == found["head"] == found["prompts"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
