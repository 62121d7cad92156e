"""What converting a large backbone takes: seconds and peak memory of each step, in a separate process.

    python bench/conversion.py --scratch DIR --size 2GB --out results/conversion.json

Makes a random Llama in sharded pytorch_model files and converts it to safetensors, to Meta's format and to a .pkl, each
from the one before; at the end every bit is compared with the first. Needs twice the size in DIR, and leaves nothing
there. Peak memory is the resident set's (ru_maxrss), pages of mapped files included. The last line of stdout is the
JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock.conversion import ConversionOptions, measure
from bench.record.files import publish
from runtime.entry import run_entry
from runtime.options import parse_options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 1 if a bit was lost."""
    options = parse_options(ConversionOptions, "bench/conversion.py", __doc__, arguments)
    record = measure(options)
    publish(record, options.out)
    return 0 if record["identical"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
