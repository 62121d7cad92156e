"""The memory of this process, and what it may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

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
