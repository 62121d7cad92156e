"""What the machine allows, read again and again in turns with what is measured: both meet the same neighbours.

On a shared machine the memory's bandwidth may halve from one minute to the next, so a pass is held against readings of
its own minutes, and their median; the best reading of the whole run says what the machine can do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bench.engine_record import Bounds, Machine
from bench.gauges import available_memory
from ops.kernel import on_cpu
from ops.machine import copy_gb_s, fma_gflop_s, last_level_cache_bytes, num_threads, read_gb_s
from runtime import jt

BUFFER = 256 << 20  # bytes at least of what is read from memory; four times the last-level cache where that is more
CACHE_SWEEPS = 20  # over half of the last-level cache, after one that is not timed
FMA_ITERATIONS = 1_000_000  # some 5 ms


class Readings:
    """Bandwidths and multiply-adds, one figure of each per ``sample``."""

    def __init__(self):
        """Raises ValueError where the kernels do not run on the CPU."""
        if not on_cpu():
            raise ValueError("bench/engine.py measures the CPU kernels; run it with GORGON_DEVICE=cpu")
        self.cache_bytes = last_level_cache_bytes()
        size = min(max(BUFFER, 4 * (self.cache_bytes or 0)), available_memory() // 8)
        self._memory = jt.ones((size // 4,))
        self._small = jt.ones((self.cache_bytes // 8,)) if self.cache_bytes else None  # 4 bytes an element
        jt.sync_all()
        self.read, self.copy, self.cache_read, self.fma = [], [], [], []

    def sample(self) -> None:
        """Read the machine once; some 50 ms."""
        self.fma.append(fma_gflop_s(FMA_ITERATIONS))
        self.read.append(read_gb_s(self._memory))
        self.copy.append(copy_gb_s(self._memory))
        if self._small is not None:
            read_gb_s(self._small)
            self.cache_read.append(read_gb_s(self._small, CACHE_SWEEPS))

    def bounds(self) -> Bounds:
        """The medians."""
        return Bounds(
            read_gb_s=float(np.median(self.read)),
            cache_read_gb_s=float(np.median(self.cache_read)) if self.cache_read else None,
            fma_gflop_s=float(np.median(self.fma)),
        )

    def release(self) -> None:
        """Give the buffers back; the figures stay."""
        self._memory = self._small = None


def best(several: Iterable[Readings]) -> Machine:
    """The best reading of each kind: whatever else ran can only have made one worse."""
    several = list(several)
    cache_reads = [value for each in several for value in each.cache_read]
    return Machine(
        threads=num_threads(),
        last_level_cache_bytes=several[0].cache_bytes,
        read_gb_s=max(value for each in several for value in each.read),
        copy_gb_s=max(value for each in several for value in each.copy),
        cache_read_gb_s=max(cache_reads, default=None),
        fma_gflop_s=max(value for each in several for value in each.fma),
    )
