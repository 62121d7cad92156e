"""llama.cpp's own benchmark, llama-bench, at the rows that bench/engine.py measures.

    python bench/peers/llama_cpp.py --model model.gguf --rows 1,2,4,8,16,32,64 --context 128

It runs the ``llama-bench`` of the PATH, or the one of --binary, and turns its JSON into milliseconds a pass. **It has
never run with a real llama-bench**: it is written after that program's documentation and tested with a stand-in that
prints the format shown there. Two differences stay. llama-bench computes the logits of a prompt's last row alone, our
passes compute all rows'; and a row of generation there, as here, is a pass of one row. Give it a GGUF file of the same
sizes and of 16-bit weights; a quantised one is another engine's other model. stdout gets one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.measure.gauges import read_counts, spread_ms
from bench.record.schema import check_writable, write_atomically
from runtime.entry import Parser, run_entry

BINARY = "llama-bench"
DESCRIPTION = "llama.cpp's own benchmark at the rows that bench/engine.py measures."
# What its JSON says of the build and the model, and what we call it.
FACTS = {
    "build_commit": "build_commit",
    "cpu_info": "device_name",
    "model_filename": "model_path",
    "model_type": "model_type",
    "model_size": "model_bytes",
    "model_n_params": "parameters",
    "n_threads": "threads",
    "type_k": "cache_dtype",
}


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/peers/llama_cpp.py", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="FILE", help="GGUF file")
    add("--binary", metavar="FILE", help=f"llama-bench itself (default: {BINARY} of the PATH)")
    add("--rows", default="1,2,4,8,16,32,64", metavar="N,N", help="rows of a pass (default: %(default)s)")
    add("--context", type=int, default=128, metavar="N", help="cached rows before a pass (default: %(default)s)")
    add("--tokens", type=int, default=64, metavar="N", help="generated one by one, 0: none (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="without: as many as llama-bench takes by itself")
    add("--repeats", type=int, default=9, metavar="N", help="of each figure (default: %(default)s)")
    add("--out", metavar="FILE", help="write the JSON here too")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for values that make no run, and for a program or a file that is not."""
    options = build_parser().parse_args(arguments)
    options.rows = read_counts("--rows", options.rows)
    for name, least in (("context", 0), ("tokens", 0), ("threads", 1), ("repeats", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    found = shutil.which(options.binary or BINARY)
    if found is None:
        where = f"{options.binary} is no program" if options.binary else f"no {BINARY} on the PATH"
        raise ValueError(f"llama.cpp is not measured: {where}; build llama.cpp and pass --binary FILE")
    options.binary = found
    if not Path(options.model).is_file():
        raise ValueError(f"{options.model} does not exist; --model takes a GGUF file")
    return options


def command(options: argparse.Namespace) -> list[str]:
    """The command line of llama-bench: one prompt per number of rows, one generation, all behind the context, on the
    CPU."""
    words = [options.binary, "-m", options.model, "-o", "json", "-r", str(options.repeats), "-ngl", "0"]
    words += ["-p", ",".join(map(str, options.rows)), "-n", str(options.tokens), "-d", str(options.context)]
    return words + (["-t", str(options.threads)] if options.threads else [])


def run(options: argparse.Namespace) -> str:
    """What llama-bench printed. Raises ValueError with its last line when it failed."""
    done = subprocess.run(command(options), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"{options.binary} left with status {done.returncode}: {last}")
    return done.stdout


def read_results(text: str, where: str) -> dict:
    """The facts and times in llama-bench's JSON, a list with one entry per test: passes (entries without generated
    tokens) and the milliseconds of a generated token.

    Worked example: an entry with n_prompt 4, n_gen 0 and samples_ns [2e6, 4e6, 6e6] is a pass of 4 rows in 4 ms,
    quartiles 3 and 5. Raises ValueError, naming ``where``, for anything else than such a list.
    """
    try:
        entries = json.loads(text)
        facts = {ours: entries[0].get(theirs) for theirs, ours in FACTS.items()}
        passes, token = [], None
        for entry in entries:
            seconds = [ns * 1e-9 for ns in entry["samples_ns"]]
            context = entry.get("n_depth", 0)
            if entry["n_gen"] == 0:
                passes.append({"rows": entry["n_prompt"], "context": context, **spread_ms(seconds)})
            elif entry["n_prompt"] == 0:
                token = {"tokens": entry["n_gen"], "context": context, **spread_ms(seconds, entry["n_gen"])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} printed something else than its documented JSON: {error!r}") from error
    return {**facts, "passes": passes, "token": token}


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    options = parse(arguments)
    if options.out:
        check_writable(options.out)
    results = read_results(run(options), options.binary)
    record = {"schema_version": 1, "kind": "peer", "peer": "llama.cpp", "command": command(options), **results}
    if options.out:
        write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    for each in results["passes"]:
        print(f"{each['rows']:4d} rows behind {each['context']}: {each['ms']:.3f} ms", file=sys.stderr)
    if results["token"]:
        print(f"one by one: {results['token']['ms']:.3f} ms a token", file=sys.stderr)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
