"""Sends Ctrl-C to real training runs at random moments and checks what is left of each.

    python tests/interrupts/campaign.py --runs 200 --out results/interrupts.json      (or: make interrupts)

A run must end with status 130, leave a whole best checkpoint and a whole state, no half-written file and no process.
The moment is drawn from the time between the card and the end of an uninterrupted run: loading kernels, steps, scoring
and saving. A run that ends before its signal does not count. Exits with status 1 if any run fails.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from heads.checkpoint import WEIGHTS, check_files, read_config  # noqa: E402
from runtime.entry import run_entry  # noqa: E402
from runtime.files.documents import write_json  # noqa: E402
from runtime.options import option, parse_options  # noqa: E402
from runtime.provenance import provenance  # noqa: E402
from trainer.config import EMBEDDED_CORPUS  # noqa: E402
from trainer.state import newest_state  # noqa: E402

DATA = "talks.jsonl.gz"
CONVERSATIONS = 1000  # of the embedded corpus: reading all of it would take most of a run
STEPS = "--max-steps 24 --score-every 8 --save-every 6 --held-out 8 --features online".split()  # noqa: SIM905
HEADS = ("mlp", "hydra", "lora")
PATIENCE = 600  # seconds


@dataclass
class Options:
    """The options of the campaign."""

    runs: int = option(200, "runs that are interrupted", metavar="N", above=0)
    heads: list[str] = option([], "heads that are trained in turn; without: mlp, hydra and lora", metavar="NAME")
    ranks: list[int] = option([], "numbers of ranks, in turn; without: 1 and 2", metavar="N")
    at_once: int = option(1, "runs at the same time", metavar="N", above=0)
    seed: int = option(0, "of the moments", metavar="N")
    out: str | None = option(None, "write the figures as JSON", metavar="FILE")


@dataclass
class Ending:
    """How a run ended. moment: seconds between the card and the signal; phase: the last line printed before it."""

    head: str
    ranks: int
    moment: float
    status: int
    seconds_to_end: float
    faults: list[str]
    phase: str
    said: str


class Training:
    """A training process in a session of its own, as a terminal would start it."""

    def __init__(self, head: str, ranks: int, out: Path):
        words = [sys.executable, "train.py", "--head", head, "--ranks", str(ranks), "--data", str(out.parent / DATA)]
        words += ["--out", str(out), "--overwrite", *STEPS]
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.begun = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("run "):  # the card's last line
                self.begun.set()
        self.begun.set()

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        self.reader.join()
        return status


def length(head: str, ranks: int, folder: Path) -> float:
    """Seconds from the card to the end of an uninterrupted run, the second one: the first compiles."""
    for _ in range(2):
        training = Training(head, ranks, folder / "length")
        training.begun.wait(PATIENCE)
        begin = time.monotonic()
        if training.wait():
            raise ValueError(f"{head} on {ranks} ranks does not train: {' | '.join(training.lines[-3:])}")
    return time.monotonic() - begin


def faults_of(out: Path, status: int, lines: list[str]) -> list[str]:
    """What is wrong with an interrupted run, in words; empty where nothing is."""
    found = [] if status == 130 else [f"status {status}"]
    if not any(line.startswith('{"status": "interrupted') for line in lines):
        found.append("no summary")
    try:
        checkpoint = out / "checkpoint"
        check_files(checkpoint, read_config(checkpoint)["files"])
        if not all(np.isfinite(tensor).all() for tensor in load_file(checkpoint / WEIGHTS).values()):
            found.append("weights that are not finite")
        if newest_state(out) is None:
            found.append("no state")
    except (ValueError, OSError) as error:
        found.append(str(error))
    found += [f"left {path.name}" for path in out.rglob("*.partial")]
    return found + [f"process {pid} still runs" for pid in still_running(out)]


def still_running(out: Path, patience: float = 5) -> list[int]:
    """Processes that name the folder in their command, once those that are ending have had a moment."""
    deadline = time.monotonic() + patience
    while True:
        found = [
            process.pid for process in psutil.process_iter(["cmdline"]) if str(out) in (process.info["cmdline"] or ())
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def interrupt(head: str, ranks: int, moment: float, out: Path) -> Ending | None:
    """One run, interrupted ``moment`` seconds after its card; None when it had ended by then."""
    training = Training(head, ranks, out)
    training.begun.wait(PATIENCE)
    time.sleep(moment)
    phase = training.lines[-1] if training.lines else ""
    if training.process.poll() is not None:
        training.wait()
        return None
    os.killpg(training.process.pid, signal.SIGINT)
    begin = time.monotonic()
    status = training.wait()
    seconds = time.monotonic() - begin
    if status == 0:  # it was past its last step
        return None
    faults = faults_of(out, status, training.lines)
    said = "\n".join(training.lines[-30:]) if faults else ""
    return Ending(head, ranks, round(moment, 3), status, round(seconds, 2), faults, phase[:40], said)


def campaign(options: Options, folder: Path) -> dict:
    """Interrupt runs, and write what is known every twenty; returns the record."""
    kinds = [(head, ranks) for ranks in options.ranks or [1, 2] for head in options.heads or HEADS]
    lengths = {kind: length(*kind, folder) for kind in kinds}
    draw = random.Random(options.seed)
    endings: list[Ending] = []
    missed = 0
    number = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        while len(endings) < options.runs:
            batch = []
            for _ in range(min(options.at_once, options.runs - len(endings))):
                kind = kinds[number % len(kinds)]
                out = folder / f"run-{number}"
                batch.append((out, pool.submit(interrupt, *kind, draw.uniform(0, lengths[kind]), out)))
                number += 1
            for out, future in batch:
                ending = future.result()
                missed += ending is None
                if ending:
                    endings.append(ending)
                    for fault in ending.faults:
                        print(f"run {number}, {ending.head} on {ending.ranks}: {fault}", flush=True)
                shutil.rmtree(out, ignore_errors=True)
            if number % 20 < options.at_once or len(endings) == options.runs:
                record = record_of(options, endings, missed, lengths)
                if options.out:
                    write_json(options.out, record, indent=1)
                counts = f"{record['status_130']} with status 130, {record['at_fault']} at fault"
                print(f"{record['runs']} interrupted, {counts}", flush=True)
    return record


def record_of(options: Options, endings: list[Ending], missed: int, lengths: dict[tuple[str, int], float]) -> dict:
    """What is written: counts, every fault, and the moments."""
    return {
        "runs": len(endings),
        "status_130": sum(ending.status == 130 for ending in endings),
        "at_fault": sum(bool(ending.faults) for ending in endings),
        "ended_before_the_signal": missed,
        "by_kind": dict(Counter(f"{ending.head} x {ending.ranks}" for ending in endings)),
        "seconds_from_card_to_end": {f"{head} x {ranks}": round(s, 1) for (head, ranks), s in lengths.items()},
        "longest_seconds_to_end": max((ending.seconds_to_end for ending in endings), default=None),
        "command": " ".join(["python", "tests/interrupts/campaign.py", *sys.argv[1:]]),
        "train_options": STEPS,
        "provenance": provenance(options.seed),
        "endings": [dataclasses.asdict(ending) for ending in endings],
    }


def main(arguments) -> int:
    """The command line."""
    options = parse_options(Options, "campaign.py", __doc__, arguments)
    with tempfile.TemporaryDirectory() as folder:
        with gzip.open(EMBEDDED_CORPUS, "rt") as corpus, gzip.open(Path(folder) / DATA, "wt") as file:
            file.writelines(itertools.islice(corpus, CONVERSATIONS))
        record = campaign(options, Path(folder))
    return 1 if record["at_fault"] else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
