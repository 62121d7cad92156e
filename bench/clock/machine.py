"""What the machine allows, read repeatedly in turns with what is measured: both have the same neighbors.

"The memory" is the one that the kernels read: the host's, or with CUDA the device's. On a shared machine its bandwidth
may halve from one minute to the next, so a pass is compared with the median of the readings beside it; the best reading
of the run shows what the machine can do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

import runtime
from bench.clock.memory import available_memory
from bench.record.engine import Bounds, Machine
from ops.kernel import on_cpu
from ops.machine import (
    copy_gb_s,
    fma_gflop_s,
    last_level_cache_bytes,
    launch_us,
    mma_tflop_s,
    num_threads,
    read_gb_s,
)
from runtime import jt


@dataclass(frozen=True)
class Load:
    """How much work a reading is. buffer: least bytes read from memory; four times the last-level cache if that is
    more. cache_sweeps: over half of that cache, after one that is not timed. fma, mma: iterations."""

    buffer: int
    cache_sweeps: int
    fma: int
    mma: int


CPU = Load(256 << 20, 20, 1_000_000, 0)  # 5 ms of multiply-adds
CUDA = Load(1 << 30, 200, 20_000, 20_000)  # about a millisecond: a device's clock is coarse


def free_memory() -> int:
    """Bytes that are free for backbones: of the host's memory, with CUDA of the device's."""
    return free_device_memory() if runtime.device == "cuda" else available_memory()


def free_device_memory() -> int:
    """Free bytes of the device, from its driver. Raises OSError if that fails.

    To be checked first: if the device is full, Jittor continues in memory shared by host and device, many times slower.
    """
    jt.gc()  # blocks that Jittor holds for reuse
    jt.zeros((1,)).sync(True)  # the driver answers for the device of the thread, which Jittor's first kernel sets
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if status:
        raise OSError(f"the driver does not report the device's memory: CUresult {status}")
    return free.value


class Readings:
    """Bandwidths and multiply-adds, one figure of each per ``sample``; with CUDA's bodies those of the device, its
    tensor cores and its launches included."""

    def __init__(self, load: Load | None = None):
        self.on_cpu = on_cpu()
        self.load = load or (CPU if self.on_cpu else CUDA)
        self.cache_bytes = last_level_cache_bytes()
        size = min(max(self.load.buffer, 4 * (self.cache_bytes or 0)), free_memory() // 8)
        self._memory = jt.ones((size // 4,))
        self._small = jt.ones((self.cache_bytes // 8,)) if self.cache_bytes else None  # 4 bytes an element
        jt.sync_all()
        self.rows: list[dict[str, float]] = []  # a reading each, by the fields of ``Machine``

    def sample(self) -> None:
        """Take one reading of each kind; about 50 ms on a CPU."""
        row = {"fma_gflop_s": fma_gflop_s(self.load.fma), "read_gb_s": read_gb_s(self._memory)}
        row["copy_gb_s"] = copy_gb_s(self._memory)
        if self._small is not None:
            read_gb_s(self._small)
            row["cache_read_gb_s"] = read_gb_s(self._small, self.load.cache_sweeps)
        if not self.on_cpu:
            row["mma_tflop_s"] = mma_tflop_s(self.load.mma)
            row["launch_host_us"], row["launch_device_us"] = launch_us()
        self.rows.append(row)

    def bounds(self) -> Bounds:
        """The medians."""
        medians = pd.DataFrame(self.rows).median()
        return Bounds(**{name: medians.get(name) for name in Bounds.model_fields})

    def release(self) -> None:
        """Free the buffers; the figures stay."""
        self._memory = self._small = None


def best(several: Iterable[Readings]) -> Machine:
    """The best reading of each kind: other work can only make a reading worse."""
    several = list(several)
    readings = pd.DataFrame([row for each in several for row in each.rows])
    launches = [name for name in readings if name.startswith("launch")]
    found = {**readings.max(), **readings[launches].min()}
    return Machine(
        threads=num_threads(),
        last_level_cache_bytes=several[0].cache_bytes,
        **{"cache_read_gb_s": None, **found},
    )
