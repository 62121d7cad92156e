"""Everything that a machine with a GPU is checked by, in one command, ending in a table of pass, fail and figures.

    python bench/gpu_check.py                       # or: make gpu-check
    python bench/gpu_check.py --only doctor engine-7b
    python bench/gpu_check.py --budget-minutes 9 --continue     # again and again, where a command may not take longer

Every step is a process of its own with a log and a time limit; what fails does not keep the others from running.
Without a usable CUDA device the steps that need one are listed and not run, which is a failure unless
``--allow-no-gpu`` says that it is known. The table comes last; the same goes as JSON, with GPU, driver and CUDA, to
results/gpu-check.json.
Exit status: 0 when nothing failed and nothing was left undone for want of a GPU or of time, else 1; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.gpu.checks import STEPS, usable_gpu
from bench.gpu.steps import DONE, NOT_RUN, ROOT, STATUSES, Outcome, Step, run_step
from bench.record.schema import check_writable, write_atomically
from runtime.entry import Parser, run_entry, suggest

NO_GPU = "no usable CUDA device"
STYLES = {"pass": "green", "fail": "red", "not run": "yellow", "skipped": "dim"}
NOTES = Console(stderr=True, highlight=False, soft_wrap=True)


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/gpu_check.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"run these steps alone, of {names}")
    parser.add_argument("--skip", nargs="+", metavar="STEP", default=[], help="leave these steps out")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="start nothing, and stop, when they are over")
    parser.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="keep what --out holds of steps that passed; run the rest",
    )
    parser.add_argument("--allow-no-gpu", action="store_true", help="status 0 though there is no usable CUDA device")
    parser.add_argument("--list", action="store_true", help="print the steps with their commands and limits, and leave")
    parser.add_argument("--out", metavar="FILE", default="results/gpu-check.json", help="default: %(default)s")
    parser.add_argument("--logs", metavar="DIR", default="runs/gpu-check", help="a file a step (default: %(default)s)")
    return parser


def choose(steps: Sequence[Step], only: Sequence[str] | None, skip: Sequence[str]) -> dict[str, str | None]:
    """Step name -> why it is left out, or None. Raises ValueError for an unknown step and for nothing left."""
    names = [step.name for step in steps]
    for name in [*(only or ()), *skip]:
        if name not in names:
            raise suggest("step", name, names)
    chosen = {}
    for name in names:
        left_out = name in skip or (only is not None and name not in only)
        chosen[name] = ("--skip" if name in skip else "not among --only") if left_out else None
    if all(chosen.values()):
        raise ValueError("--only and --skip leave no step; name others")
    return chosen


def read_outcomes(path: Path, gpu: str | None, sha: str | None) -> dict[str, Outcome]:
    """The steps of an earlier file that passed; an absent file has none. Raises ValueError for a file of another kind,
    another GPU or another commit: figures of two must not stand in one table."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != "gpu-check":
            raise ValueError(f"its kind is {data['kind']!r}")
        found = [Outcome(**each) for each in data["steps"]]
        for name, now in (("gpu", gpu), ("git_sha", sha)):
            if data["provenance"][name] != now:
                raise ValueError(f"its {name} is {data['provenance'][name]}, here it is {now}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be continued: {error}; leave --continue out, or give another --out") from error
    return {each.name: each for each in found if each.status == "pass"}


def check(
    steps: Sequence[Step], options: argparse.Namespace, gpu: bool, kept: dict[str, Outcome]
) -> tuple[list[Outcome], bool]:
    """(an outcome for each step, whether Ctrl-C ended the run). After Ctrl-C the steps left are 'not run'."""
    left_out, outcomes, interrupted = choose(steps, options.only, options.skip), [], False
    ends = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    for step in steps:
        reason = left_out[step.name]
        if step.name in kept:
            outcome = kept[step.name]
        elif reason:
            outcome = Outcome(step.name, "skipped", reason=reason)
        elif interrupted:
            outcome = Outcome(step.name, NOT_RUN, reason="interrupted")
        elif step.needs_gpu and not gpu:
            outcome = Outcome(step.name, NOT_RUN, reason=NO_GPU)
        elif lacks := step.missing():
            outcome = Outcome(step.name, "skipped", reason=lacks)
        elif ends is not None and time.monotonic() >= ends:
            outcome = Outcome(step.name, NOT_RUN, reason="the budget is spent")
        else:
            NOTES.print(f"{step.name:20} {' '.join(step.shown)}", markup=False)
            try:
                outcome = run_step(step, Path(options.logs), ends)
            except KeyboardInterrupt:
                interrupted = True
                outcome = Outcome(step.name, NOT_RUN, reason="interrupted")
        if outcome.status in DONE and step.name not in kept:
            NOTES.print(
                f"{step.name:20} {outcome.status}, {outcome.seconds:.0f} s  {outcome.reason or ''}", markup=False
            )
        outcomes.append(outcome)
    return outcomes, interrupted


def ask(*words: str, environment: dict[str, str] | None = None, timeout_s: float = 60) -> str | None:
    """What a command prints; None where it is missing, fails or says nothing."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, check=True, cwd=ROOT, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe_gpu() -> dict:
    """GPU, driver and CUDA as nvidia-smi and nvcc tell them; None each where they do not answer."""
    smi = ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    name, driver, memory = (part.strip() for part in smi.splitlines()[0].split(",")) if smi else (None, None, None)
    nvcc = ask("nvcc", "--version")
    release = next((line.split("release")[1].strip() for line in (nvcc or "").splitlines() if "release" in line), None)
    return {
        "gpu": name,
        "driver": driver,
        "gpu_memory_bytes": int(memory) << 20 if memory and memory.isdigit() else None,
        "nvcc": release,
    }


PROVENANCE = "import json, runtime; print(json.dumps(runtime.provenance()))"


def provenance(gpu: bool, outcomes: Sequence[Outcome]) -> dict:
    """What ``runtime.provenance`` says in a process of its own. Empty where no such process starts, which the steps
    tell better; also on a GPU that Jittor is not known to start on, where the answer would be another device's."""
    started = any(each.name == "core" and each.status == "pass" for each in outcomes)
    if gpu and not started:
        return {}
    environment = {**os.environ, "GORGON_DEVICE": "cuda" if gpu else "cpu"}
    said = ask(sys.executable, "-c", PROVENANCE, environment=environment, timeout_s=600)
    return json.loads(said.splitlines()[-1]) if said else {}


def command(arguments: Sequence[str]) -> list[str]:
    """The command line, as provenance holds it."""
    return ["bench/gpu_check.py", *arguments]


def summary_table(outcomes: Sequence[Outcome], steps: Sequence[Step]) -> Table:
    """A line for each step."""
    table = Table(title="GPU check", title_justify="left", title_style="bold")
    for name in ("step", "outcome"):
        table.add_column(name)
    table.add_column("s", justify="right")
    table.add_column("figures, or why not")
    for outcome, step in zip(outcomes, steps, strict=True):
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.0f}"
        words = [step.line(outcome.figures)] if outcome.figures else []
        words += [outcome.reason] if outcome.reason else []
        if outcome.status == "fail" and outcome.log:
            words.append(f"see {outcome.log}")
        table.add_row(outcome.name, Text(outcome.status, style=STYLES[outcome.status]), seconds, Text("; ".join(words)))
    return table


def verdict(outcomes: Sequence[Outcome], allow_no_gpu: bool, interrupted: bool) -> tuple[int, str]:
    """(exit status, the sentence under the table)."""
    counts = {status: sum(each.status == status for each in outcomes) for status in STATUSES}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    no_gpu = any(each.reason == NO_GPU for each in outcomes)
    undone = counts[NOT_RUN] > sum(each.reason == NO_GPU for each in outcomes)
    if interrupted:
        return 130, f"{text}; interrupted"
    if no_gpu:
        text += f"; {NO_GPU}: nothing was checked on a GPU"
        if not allow_no_gpu:
            text += " (--allow-no-gpu makes that no failure)"
    failed = counts["fail"] or undone or (no_gpu and not allow_no_gpu)
    return int(bool(failed)), text


def main(arguments: Sequence[str], steps: Sequence[Step] = STEPS) -> int:
    """The command line. steps: those to know."""
    options = build_parser().parse_args(arguments)
    choose(steps, options.only, options.skip)
    if options.budget_minutes is not None and options.budget_minutes <= 0:
        raise ValueError(f"--budget-minutes must be above 0, got {options.budget_minutes}")
    if options.list:
        for step in steps:
            where = "GPU" if step.needs_gpu else "any machine"
            print(f"{step.name:20} {step.limit_s / 60:4.0f} min  {where:12} {' '.join(step.shown)}")
        return 0
    out = Path(options.out)
    check_writable(out)
    gpu, reason = usable_gpu()
    card, sha = describe_gpu(), ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    kept = read_outcomes(out, card["gpu"], sha) if options.resume else {}
    NOTES.print(f"device               {'CUDA' if gpu else 'no CUDA'}: {reason}", markup=False)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's wish ends the step in hand too
    try:
        outcomes, interrupted = check(steps, options, gpu, kept)
    finally:
        signal.signal(signal.SIGTERM, before)
    status, text = verdict(outcomes, options.allow_no_gpu, interrupted)
    where = {**card, "device": "cuda" if gpu else "cpu", "device_reason": reason}
    record = {
        "schema_version": 1,
        "kind": "gpu-check",
        "provenance": {**provenance(gpu, outcomes), "git_sha": sha, "command": command(arguments), **where},
        "status": status,
        "steps": [each.plain() for each in outcomes],
    }
    write_atomically(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 10_000).print(
        summary_table(outcomes, steps)
    )
    print(text)
    print(f"written to {out}")
    print(json.dumps(record, allow_nan=False))
    return status


if __name__ == "__main__":
    sys.exit(run_entry(main))
