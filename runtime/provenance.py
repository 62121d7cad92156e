"""Where a number comes from: commit, command, versions and machine of this process."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from runtime import door
from runtime.context import world_size

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jittor", "numpy", "transformers", "tokenizers", "safetensors")
OPTIONAL = {"torch"}  # listed only when it is loaded


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # a copy without git history has no commit
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """The first GPU's name as nvidia-smi reports it; None where that is not installed."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _command() -> list[str]:
    """The command line, with a program inside the project relative to its root."""
    words = list(sys.argv)
    path = Path(words[0]).resolve() if words and words[0] else None
    if path and path.is_relative_to(ROOT):
        words[0] = str(path.relative_to(ROOT))
    return words


def provenance(seed: int | None = None) -> dict:
    """A JSON-ready record of this process: commit, command, UTC time, versions, device, ranks, seed.

    ``git_sha`` and ``git_dirty`` are None in a copy without history. ``threads``: cores this process may use;
    ``memory_bytes``: of the machine.
    """
    import psutil  # here, so that the doctor runs where nothing is installed

    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": _command(),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in (*PACKAGES, *OPTIONAL & sys.modules.keys())},
        "device": door.device,
        "device_name": cpu_name() if door.device == "cpu" else gpu_name(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        "memory_bytes": psutil.virtual_memory().total,
        "world_size": world_size(),
        "seed": seed,
    }
