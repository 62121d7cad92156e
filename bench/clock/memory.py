"""The memory of this process, what it may still take, and work whose memory is measured in a separate process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.record.files import ROOT
from runtime.files.documents import parse_json, to_json

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")


def rss() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def reset_peak() -> bool:
    """Reset the peak of this process's memory, so that ``peak_rss`` counts from now. False if the system cannot."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int | None:
    """Peak bytes of memory that this process held since ``reset_peak``; None if the system does not record it."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: what the machine has free, or less if its control group allows less."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # not in a control group of version 2
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def run_apart(module: str, task: Mapping[str, Any], what: str) -> Any:
    """What ``python -m module TASK``, a process that holds nothing else, prints as its last line of JSON.

    what: the work, in a message. Raises ValueError if the process fails or is ended, as for its memory.
    """
    command = [sys.executable, "-m", module, to_json(task)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        reason = "there is not enough memory" if done.returncode == -signal.SIGKILL else "see above"
        raise ValueError(f"{what} was ended by signal {-done.returncode}: {reason}")
    if done.returncode:
        raise ValueError(f"{what} failed; see the reason above")
    return parse_json(done.stdout.splitlines()[-1], what)
