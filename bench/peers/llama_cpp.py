"""llama.cpp at the rows that bench/engine.py measures.

    python bench/peers/llama_cpp.py --model model.gguf --rows 1,2,4,8,16,32,64 --context 128
    python bench/peers/llama_cpp.py --model model.gguf --python llama/bin/python

It runs the ``llama-bench`` of the PATH, or the one of --binary, or asks the xllamacpp wheel of --python the same, and
turns the JSON into milliseconds per pass. Tried with the wheel; llama-bench itself by its documented format alone. One
difference remains: llama.cpp computes the logits of a prompt's last row only, our passes those of all rows. Give it a
GGUF file of the same sizes with 16-bit weights; a quantized one is another model. stdout gets one line of JSON.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.files.documents import parse_json

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.clock.timing import read_counts, spread_ms
from bench.record.files import ROOT, publish
from bench.tables.terminal import note
from runtime.atomic import check_writable
from runtime.entry import run_entry
from runtime.options import option, parse_options

BINARY = "llama-bench"
IN_PROCESS = "bench.peers.xllamacpp_bench"
# Fields of its JSON on the build and the model -> our names.
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


@dataclass
class LlamaCppOptions:
    """The options of this entry."""

    model: str | None = option(None, "GGUF file (required)", metavar="FILE")
    binary: str | None = option(None, f"llama-bench itself (default: {BINARY} of the PATH)", metavar="FILE")
    python: str | None = option(
        None, "Python of an environment with the xllamacpp wheel, in place of a binary", metavar="FILE"
    )
    rows: str = option("1,2,4,8,16,32,64", "rows of a pass, separated by commas", metavar="N,N")
    context: int = option(128, "cached rows before a pass", metavar="N", least=0)
    tokens: int = option(64, "generated one by one, 0: none", metavar="N", least=0)
    threads: int | None = option(None, "without: as many as llama-bench takes by itself", metavar="N", least=1)
    repeats: int = option(9, "of each figure", metavar="N", least=1)
    out: str | None = option(None, "write the JSON here too", metavar="FILE")

    def check(self) -> None:
        """Find the program. Raises ValueError for a program or a file that does not exist and for no counts, and
        OSError for an ``out`` that cannot be written."""
        self.row_counts  # noqa: B018  raises ValueError
        self.program  # noqa: B018  raises ValueError
        if not self.model or not Path(self.model).is_file():
            raise ValueError(f"{self.model or '--model'} does not exist; --model takes a GGUF file")
        if self.out:
            check_writable(self.out)

    @property
    def program(self) -> list[str]:
        """The first words of what measures. Raises ValueError if there is no such program."""
        if self.binary and self.python:
            raise ValueError("--binary and --python name two programs that measure; drop one")
        named = self.binary or self.python
        found = shutil.which(named or BINARY)
        if found is None:
            where = f"{named} is no program" if named else f"no {BINARY} on the PATH"
            raise ValueError(
                f"llama.cpp is not measured: {where}; build llama.cpp and pass --binary FILE, or install xllamacpp "
                "somewhere and pass --python FILE"
            )
        # Not resolved: an environment's Python is a link to another one.
        return [str(Path(found).absolute()), *(["-m", IN_PROCESS] if self.python else [])]

    @property
    def row_counts(self) -> list[int]:
        """The rows of a pass. Raises ValueError for anything but whole numbers from 1."""
        return read_counts("--rows", self.rows)


def command(options: LlamaCppOptions) -> list[str]:
    """The command line of llama-bench, or of what stands for it: one prompt per number of rows, one generation, all
    after the context, on the CPU."""
    words = [
        *options.program,
        "-m",
        str(Path(options.model).absolute()),
        "-o",
        "json",
        "-r",
        str(options.repeats),
        "-ngl",
        "0",
    ]
    words += ["-p", ",".join(map(str, options.row_counts)), "-n", str(options.tokens), "-d", str(options.context)]
    return words + (["-t", str(options.threads)] if options.threads else [])


def run(options: LlamaCppOptions) -> str:
    """What it printed. Raises ValueError with its last line if it failed."""
    done = subprocess.run(command(options), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise ValueError(f"{options.program[0]} ended with status {done.returncode}: {last}")
    return done.stdout


def read_results(text: str, where: str) -> dict:
    """The facts and times in llama-bench's JSON, a list with one entry per test: passes (entries without generated
    tokens) and the milliseconds of a generated token.

    Worked example: an entry with n_prompt 4, n_gen 0 and samples_ns [2e6, 4e6, 6e6] is a pass of 4 rows in 4 ms,
    quartiles 3 and 5. Raises ValueError, naming ``where``, for anything but such a list.
    """
    try:
        entries = parse_json(text, where)
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
        raise ValueError(f"{where} did not print its documented JSON: {error!r}") from error
    return {**facts, "passes": passes, "token": token}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_options(LlamaCppOptions, "bench/peers/llama_cpp.py", __doc__, arguments)
    results = read_results(run(options), options.program[0])
    record = {"schema_version": 1, "kind": "peer", "peer": "llama.cpp", "command": command(options), **results}
    for each in results["passes"]:
        note(f"{each['rows']:4d} rows after {each['context']}: {each['ms']:.3f} ms")
    if results["token"]:
        note(f"one by one: {results['token']['ms']:.3f} ms per token")
    publish(record, options.out)


if __name__ == "__main__":
    sys.exit(run_entry(main))
