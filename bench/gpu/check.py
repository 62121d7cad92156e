"""Runs the steps of the GPU check whatever becomes of each, for ``bench/gpu_check.py``, and writes its record."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.gpu.step import DONE, NOT_RUN, STATUSES, Outcome, Step, run_step
from bench.gpu.steps import usable_gpu
from bench.record.files import ROOT, publish
from bench.tables.terminal import note, show_table
from runtime.atomic import check_writable
from runtime.entry import suggest
from runtime.files.documents import parse_json, read_json
from runtime.options import option

NO_GPU = "no usable CUDA device"
STYLES = {"pass": "green", "fail": "red", "not run": "yellow", "skipped": "dim"}


@dataclass
class CheckOptions:
    """The options of bench/gpu_check.py."""

    only: list[str] = option([], "run these steps only; --list prints all", metavar="STEP")
    skip: list[str] = option([], "leave these steps out", metavar="STEP")
    budget_minutes: float | None = option(
        None, "start no step, and stop the current one, after these minutes", metavar="M", above=0
    )
    allow_no_gpu: bool = option(False, "status 0 although there is no usable CUDA device")
    out: str = option("results/gpu-check.json", "where the JSON goes", metavar="FILE")
    logs: str = option("runs/gpu-check", "a file per step", metavar="DIR")
    resume: bool = option(False, "reuse the steps that passed in --out; run the rest", name="--continue")
    show_steps: bool = option(False, "print the steps with commands and limits", name="--list")


def choose(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> dict[str, str | None]:
    """Step name -> why it is left out, or None. Raises ValueError for an unknown step and if no step is left."""
    names = [step.name for step in steps]
    for name in [*only, *skip]:
        if name not in names:
            raise suggest("step", name, names)
    chosen = {}
    for name in names:
        left_out = name in skip or bool(only and name not in only)
        chosen[name] = ("--skip" if name in skip else "not among --only") if left_out else None
    if all(chosen.values()):
        raise ValueError("--only and --skip leave no step; name others")
    return chosen


def read_outcomes(path: Path, gpu: str | None, sha: str | None) -> dict[str, Outcome]:
    """The steps of an earlier file that passed; none if there is no file. Raises ValueError for a file of another kind,
    GPU or commit: their figures must not share one table."""
    if not path.exists():
        return {}
    try:
        data = read_json(path)
        if data["kind"] != "gpu-check":
            raise ValueError(f"its kind is {data['kind']!r}")
        found = [Outcome(**each) for each in data["steps"]]
        for name, now in (("gpu", gpu), ("git_sha", sha)):
            if data["provenance"][name] != now:
                raise ValueError(f"its {name} is {data['provenance'][name]}, here it is {now}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be continued: {error}; drop --continue, or give another --out") from error
    return {each.name: each for each in found if each.status == "pass"}


def check(
    steps: Sequence[Step], options: CheckOptions, gpu: bool, passed: dict[str, Outcome]
) -> tuple[list[Outcome], bool]:
    """(an outcome for each step, whether Ctrl-C ended the run). passed: outcomes of an earlier run, which are reused.

    After Ctrl-C the remaining steps are 'not run'."""
    left_out, outcomes, interrupted = choose(steps, options.only, options.skip), [], False
    ends = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    for step in steps:
        reason = left_out[step.name]
        if step.name in passed:
            outcome = passed[step.name]
        elif reason:
            outcome = Outcome(step.name, "skipped", reason=reason)
        elif interrupted:
            outcome = Outcome(step.name, NOT_RUN, reason="interrupted")
        elif step.needs_gpu and not gpu:
            outcome = Outcome(step.name, NOT_RUN, reason=NO_GPU)
        elif missing := step.missing():
            outcome = Outcome(step.name, "skipped", reason=missing)
        elif ends is not None and time.monotonic() >= ends:
            outcome = Outcome(step.name, NOT_RUN, reason="the budget is used up")
        else:
            note(f"{step.name:20} {' '.join(step.shown)}")
            try:
                outcome = run_step(step, Path(options.logs), ends)
            except KeyboardInterrupt:
                interrupted = True
                outcome = Outcome(step.name, NOT_RUN, reason="interrupted")
        if outcome.status in DONE and step.name not in passed:
            note(f"{step.name:20} {outcome.status}, {outcome.seconds:.0f} s  {outcome.reason or ''}")
        outcomes.append(outcome)
    return outcomes, interrupted


def output_of(*words: str, environment: dict[str, str] | None = None, timeout_s: float = 60) -> str | None:
    """What a command prints; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, check=True, cwd=ROOT, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe_gpu() -> dict:
    """GPU, driver and CUDA from nvidia-smi and nvcc; None each if they do not answer."""
    smi = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    name, driver, memory = (part.strip() for part in smi.splitlines()[0].split(",")) if smi else (None, None, None)
    nvcc = output_of("nvcc", "--version")
    release = next((line.split("release")[1].strip() for line in (nvcc or "").splitlines() if "release" in line), None)
    return {
        "gpu": name,
        "driver": driver,
        "gpu_memory_bytes": int(memory) << 20 if memory and memory.isdigit() else None,
        "nvcc": release,
    }


PROVENANCE = "import runtime\nfrom runtime.files.documents import to_json\nprint(to_json(runtime.provenance()))"


def provenance(gpu: bool, outcomes: Sequence[Outcome]) -> dict:
    """``runtime.provenance`` of a separate process. Empty if none starts, which the steps explain better, and on a GPU
    that Jittor is not known to start on, as the answer would be another device's."""
    started = any(each.name == "core" and each.status == "pass" for each in outcomes)
    if gpu and not started:
        return {}
    environment = {**os.environ, "GORGON_DEVICE": "cuda" if gpu else "cpu"}
    text = output_of(sys.executable, "-c", PROVENANCE, environment=environment, timeout_s=600)
    return parse_json(text.splitlines()[-1], "runtime.provenance") if text else {}


def show_outcomes(outcomes: Sequence[Outcome], steps: Sequence[Step]) -> None:
    """Print a row per step."""
    rows = []
    for outcome, step in zip(outcomes, steps, strict=True):
        words = [step.line(outcome.figures)] if outcome.figures else []
        words += [outcome.reason] if outcome.reason else []
        if outcome.status == "fail" and outcome.log:
            words.append(f"see {outcome.log}")
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.0f}"
        rows.append((outcome.name, outcome.status, seconds, "; ".join(words)))
    columns = ["step", "outcome", "s", "figures, or why not"]
    show_table(
        "GPU check",
        pd.DataFrame(rows, columns=columns),
        ["step", "outcome", columns[-1]],
        lambda column, cell: STYLES.get(cell, "") if column == "outcome" else "",
    )


def verdict(outcomes: Sequence[Outcome], allow_no_gpu: bool, interrupted: bool) -> tuple[int, str]:
    """(exit status, the sentence under the table)."""
    counts = {status: sum(each.status == status for each in outcomes) for status in STATUSES}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    no_gpu = sum(each.reason == NO_GPU for each in outcomes)
    if interrupted:
        return 130, f"{text}; interrupted"
    if no_gpu:
        text += f"; {NO_GPU}: nothing was checked on a GPU"
        if not allow_no_gpu:
            text += " (with --allow-no-gpu that is no failure)"
    failed = counts["fail"] or counts[NOT_RUN] > no_gpu or (no_gpu and not allow_no_gpu)
    return int(bool(failed)), text


def run_check(options: CheckOptions, steps: Sequence[Step], words: Sequence[str]) -> int:
    """The complete check. words: the command line, for the record. Returns the exit status.

    Raises ValueError for an unknown step and for a file that cannot be resumed.
    """
    choose(steps, options.only, options.skip)
    if options.show_steps:
        for step in steps:
            where = "GPU" if step.needs_gpu else "any machine"
            print(f"{step.name:20} {step.limit_s / 60:4.0f} min  {where:12} {' '.join(step.shown)}")
        return 0
    out = Path(options.out)
    check_writable(out)
    gpu, reason = usable_gpu()
    card, sha = describe_gpu(), output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    passed = read_outcomes(out, card["gpu"], sha) if options.resume else {}
    note(f"device               {'CUDA' if gpu else 'no CUDA'}: {reason}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM ends the step too
    try:
        outcomes, interrupted = check(steps, options, gpu, passed)
    finally:
        signal.signal(signal.SIGTERM, before)
    status, text = verdict(outcomes, options.allow_no_gpu, interrupted)
    where = {**card, "device": "cuda" if gpu else "cpu", "device_reason": reason}
    command = ["bench/gpu_check.py", *words]
    record = {
        "schema_version": 1,
        "kind": "gpu-check",
        "provenance": {**provenance(gpu, outcomes), "git_sha": sha, "command": command, **where},
        "status": status,
        "steps": [dataclasses.asdict(each) for each in outcomes],
    }
    show_outcomes(outcomes, steps)
    print(text)
    print(f"written to {out}")
    publish(record, out)
    return status
