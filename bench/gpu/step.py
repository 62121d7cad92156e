"""One command with a log and a time limit, and its outcome."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record.files import ROOT, project_path
from runtime.files.documents import identity

NOT_RUN = "not run"  # no GPU, no time, or interrupted
STATUSES = ("pass", "fail", NOT_RUN, "skipped")
DONE = ("pass", "fail")
GRACE_S = 10.0  # between SIGTERM and SIGKILL


class StepFailed(ValueError):
    """A step's result shows a failure, though its process succeeded. ``figures``: those that are known."""

    def __init__(self, reason: str, figures: dict[str, Any] | None = None):
        super().__init__(reason)
        self.figures = figures or {}


def join_figures(figures: Mapping[str, Any]) -> str:
    """All figures by name: "passed 12, failed 0"."""
    return ", ".join(f"{name} {value}" for name, value in figures.items())


@dataclass(frozen=True)
class Step:
    """One command. read: its result, or its log, -> figures with units in their names; raises StepFailed if the command
    succeeded with a bad result; without it only the status counts. line: the figures as the table shows them. missing:
    why it cannot be run here, or None. result: the file that the command writes; it and ``clears`` are removed before,
    as those of an earlier run must not be taken for this one's."""

    name: str
    command: Sequence[str]
    limit_s: float
    needs_gpu: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path], dict[str, Any]] = lambda log: {}
    line: Callable[[Mapping[str, Any]], str] = join_figures
    missing: Callable[[], str | None] = lambda: None
    result: Path | None = None
    clears: Sequence[Path] = ()

    @property
    def shown(self) -> list[str]:
        """The command as a person would type it; a program text is shortened to its first word."""
        settings = [f"{name}={value}" for name, value in self.env.items()]
        return settings + [_shown(word) for word in self.command]


def _shown(word: str) -> str:
    if word == sys.executable:
        return "python"
    if "\n" in word:
        return f"'{word.split()[0]} ...'"
    return shlex.quote(project_path(word) if Path(word).is_absolute() else word)


@dataclass
class Outcome:
    """status: one of STATUSES. seconds: of the process. log: relative to the project if it is inside."""

    name: str
    status: str
    seconds: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    log: str | None = None


def run_step(step: Step, logs: Path, ends: float | None = None) -> Outcome:
    """Run a step; its output goes to ``<logs>/<name>.log`` only. ends: when to stop it, by ``time.monotonic()``.

    A step that exceeds its limit is ended with every process that it started. Ctrl-C ends it too and is raised.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{step.name}.log"
    for path in (step.result, *step.clears):
        if path:
            path.unlink(missing_ok=True)
    start = time.monotonic()
    limit = step.limit_s if ends is None else min(step.limit_s, max(0.0, ends - start))
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env={**os.environ, **step.env}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, "fail", 0.0, reason=f"cannot start: {error}", log=project_path(log))
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    outcome = Outcome(step.name, "fail", time.monotonic() - start, log=project_path(log))
    if status is None and limit < step.limit_s:
        outcome.status, outcome.reason = NOT_RUN, "stopped: the budget is used up"
    elif status is None:
        outcome.reason = f"stopped after its limit of {step.limit_s:g} s"
    elif status < 0:
        outcome.reason = f"ended by signal {-status}: {last_line(log)}"
    elif status:
        outcome.reason = f"exit status {status}: {last_line(log)}"
    try:
        figures = {} if status is None else step.read(step.result or log)
        identity(figures, allow_nan=False)  # a NaN must not cost the record
        outcome.figures = figures
        if status == 0:
            outcome.status = "pass"
    except StepFailed as error:
        outcome.figures = error.figures
        outcome.reason = outcome.reason or str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        outcome.reason = outcome.reason or f"its figures cannot be read: {error!r}"
    return outcome


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started, by SIGTERM, then SIGKILL. Does nothing if none is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader, so that the group can become empty
            os.killpg(process.pid, 0)  # raises ProcessLookupError once none is left
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path, longest: int = 160) -> str:
    """The last nonblank line of a log, cut to ``longest`` characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:longest] if lines else "it printed nothing"
