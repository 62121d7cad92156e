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

from bench.clock.conversion import measure
from bench.record.files import publish
from runtime.atomic import check_writable
from runtime.entry import Parser, run_entry


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 1 if a bit was lost."""
    parser = Parser(prog="bench/conversion.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--scratch", required=True, metavar="DIR", help="an existing folder on the disk to measure")
    add("--size", default="2GB", help="of the model's weights (default: %(default)s)")
    add("--shard-size", default="500MB", metavar="SIZE", help="of a weight file (default: %(default)s)")
    add("--out", metavar="FILE", help="write the JSON here too")
    options = parser.parse_args(arguments)
    if not Path(options.scratch).is_dir():
        raise ValueError(f"--scratch {options.scratch} is not a folder; name an existing one")
    if options.out:
        check_writable(options.out)
    record = measure(options.scratch, options.size, options.shard_size)
    publish(record, options.out)
    return 0 if record["identical"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
