"""The clock of all measurements outside the decoding loop: calls timed in turns, medians, lists of sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Mapping

import numpy as np

from runtime.interrupt import check_interrupt

TURN_S = 0.02  # least seconds of a turn of shorter calls: many times the grain of the scheduler
BUSY = 0.25  # processes per core, over the last minute, from which on a machine counts as busy


def interleave(
    functions: Mapping[Hashable, Callable[[], object]], repeats: int, turn_s: float = TURN_S
) -> dict[Hashable, list[float]]:
    """Seconds of a call of each function, ``repeats`` figures each. A function waits for its own result; one that
    works in another process returns the seconds that it took there, as a float.

    All take turns, and each round begins with another one, so that a machine that grows busier or warmer affects all
    equally and none always follows the same neighbor. Short calls are made several times per turn: the first refills
    the caches and is not counted, the median of the others is the turn's figure. Before the first round each function
    is called twice. Ctrl-C takes effect between turns.
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


def busy_note(cores: int) -> list[str]:
    """A note if the machine is busy before a measurement begins: kernels whose threads wait for each other suffer."""
    load = os.getloadavg()[0]
    if load <= BUSY * cores:
        return []
    return [f"the machine was busy: {load:.1f} processes ran on {cores} cores before this measurement began"]


def read_counts(flag: str, text: str) -> list[int]:
    """The numbers of an option, ascending, each once: "4,1,4" -> [1, 4]. Raises ValueError for anything but whole
    numbers from 1, separated by commas."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ValueError(f"{flag} takes whole numbers separated by commas, such as 1,2,4; got {text!r}") from None
    if counts[0] < 1:
        raise ValueError(f"{flag} must be at least 1, got {counts[0]}")
    return counts
