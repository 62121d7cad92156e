"""Our training beside the same training in plain PyTorch, in turns, on the same batches and as many threads.

    python bench/peers/torch_train.py --out results/train-peers.json

Three trainings of each head on the CPU, from the same weights: PyTorch with transformers' backbone at every step,
PyTorch on our feature cache, and ours on it. Notes go to stderr; stdout gets a table and one line of JSON. Run it on a
quiet machine: four heads take about 20 minutes, 15 with --no-compile.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.peers.train_comparison import TrainPeerOptions, measure, show_trainings
from bench.record.files import publish
from runtime.atomic import check_writable
from runtime.entry import Parser, run_entry
from runtime.options import add_options, read_options


def parse(arguments: Sequence[str]) -> TrainPeerOptions:
    """The checked options. Raises ValueError for unknown ones and for values that make no run."""
    parser = Parser(prog="bench/peers/torch_train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_options(parser, TrainPeerOptions)
    options = read_options(TrainPeerOptions, parser.parse_args(arguments))
    options.check()
    if importlib.util.find_spec("torch") is None:
        raise ValueError("torch is not installed; it comes with requirements-dev.txt: make setup-dev")
    return options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse(arguments)
    if options.out:
        check_writable(options.out)
    record = measure(options)
    show_trainings(record)
    publish(record, options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
