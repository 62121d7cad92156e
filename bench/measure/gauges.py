"""Clock and scales of the engine's measurement: calls timed in turns, the memory of this process, lists of sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import numpy as np
import psutil

from runtime.interrupt import check_interrupt

# Seconds that a turn lasts at least, where one call is shorter: many times the grain of the scheduler.
TURN_S = 0.02
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")


def interleave(
    functions: Mapping[Hashable, Callable[[], object]], repeats: int, turn_s: float = TURN_S
) -> dict[Hashable, list[float]]:
    """Seconds of a call of each function, ``repeats`` figures each. A function waits for its own result; one that
    works in another process returns the seconds that it took there, as a float.

    All take turns, and each round begins with another one, so that a machine that grows busier or warmer hits all
    alike and none always follows the same neighbour. Short calls are made several times a turn; the first of them
    brings the caches back and is not counted, the median of the others is the turn's figure. Before the first round
    each function is called twice. Ctrl-C is heeded between turns.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, int(np.ceil(turn_s / max(_time(function), 1e-6))))
        check_interrupt()
    names, seconds = list(functions), {name: [] for name in functions}
    for round_ in range(repeats):
        start = round_ % max(len(names), 1)
        for name in names[start:] + names[:start]:
            if calls[name] > 1:
                functions[name]()
            seconds[name].append(float(np.median([_time(functions[name]) for _ in range(calls[name])])))
            check_interrupt()
    return seconds


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    given = function()
    return given if isinstance(given, float) else time.perf_counter() - start


def spread_ms(seconds, per: int = 1) -> dict[str, float]:
    """Median and quartiles in milliseconds, divided by ``per``: {"ms", "ms_low", "ms_high"}."""
    low, middle, high = np.percentile(np.asarray(seconds) * 1e3 / per, [25, 50, 75])
    return {"ms": float(middle), "ms_low": float(low), "ms_high": float(high)}


def rss() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def reset_peak() -> bool:
    """Forget the peak of this process's memory, so that ``peak_rss`` counts from now. False where that cannot be."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int | None:
    """Bytes of memory that this process held at most since ``reset_peak``; None where the system does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: what the machine has free, less where its control group allows less."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # not in a control group of version 2
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def read_counts(flag: str, text: str) -> list[int]:
    """The numbers of an option, ascending, each once: "4,1,4" -> [1, 4]. Raises ValueError for anything but whole
    numbers from 1 on with commas between."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ValueError(f"{flag} takes whole numbers with commas between, such as 1,2,4; got {text!r}") from None
    if counts[0] < 1:
        raise ValueError(f"{flag} must be at least 1, got {counts[0]}")
    return counts
