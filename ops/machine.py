"""How fast this machine reads, copies and multiplies: the bounds that a kernel's time is held against.

All threads that the kernels use take part, and the clock runs inside the kernel, so that no launch is counted. For the
CPU alone.
"""

from __future__ import annotations

from pathlib import Path

from ops.kernel import cpu_header
from runtime import jt

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(caches: Path = CACHES) -> int | None:
    """Bytes of the largest cache of the first core, which its neighbours may share; None where nothing tells it.

    Linux says it in files: ``index3/size`` holds "32768K".
    """
    sizes = [path.read_text().strip() for path in sorted(caches.glob("index*/size"))]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS), default=None)


def num_threads() -> int:
    """Threads that a kernel runs with."""
    count = jt.code((1,), "int32", [], cpu_header=cpu_header("machine.h"), cpu_src="out0_p[0] = omp_get_max_threads();")
    return int(count.numpy()[0])


def read_gb_s(buffer, sweeps: int = 1) -> float:
    """Gigabytes per second, 1e9 bytes, of reading a buffer ``sweeps`` times. buffer: (count,) float32, computed.

    One sweep over a buffer much larger than the caches measures the memory, many over a small one the cache.
    """
    return 4 * buffer.shape[0] * sweeps / read(buffer, sweeps)[0] / 1e9


def read(buffer, sweeps: int) -> tuple[float, float]:
    """(seconds, the sum of everything that was read). Less than 512 elements a thread at the end are left out."""
    seconds, total = jt.code(
        [(1,), (1,)],
        ["float64", "float32"],
        [buffer],
        cpu_header=cpu_header("machine.h"),
        cpu_src='out0_p[0] = gorgon::read_seconds(in0_p, in0_shape0, (int64_t)data["sweeps"], out1_p);',
        data={"sweeps": sweeps},
    )
    return float(seconds.numpy()[0]), float(total.numpy()[0])


def copy_gb_s(source) -> float:
    """Gigabytes per second of copying into memory that was written before; what is read and what is written both
    count. source: (count,) float32, computed."""
    return 8 * source.shape[0] / copy(source)[0] / 1e9


def copy(source) -> tuple[float, object]:
    """(seconds of the second copy into the same place, the copy)."""
    seconds, target = jt.code(
        [(1,), tuple(source.shape)],
        ["float64", "float32"],
        [source],
        cpu_header=cpu_header("machine.h"),
        cpu_src="""
        gorgon::copy_seconds(in0_p, in0_shape0, out1_p);
        out0_p[0] = gorgon::copy_seconds(in0_p, in0_shape0, out1_p);
        """,
    )
    return float(seconds.numpy()[0]), target


def fma_gflop_s(iterations: int) -> float:
    """1e9 operations per second of fused multiply-adds in float32, two operations each, in registers."""
    seconds, operations, _ = jt.code(
        [(1,), (1,), (1,)],
        ["float64", "float64", "float32"],
        [],
        cpu_header=cpu_header("machine.h"),
        cpu_src="""
        int64_t iterations = (int64_t)data["iterations"];
        out0_p[0] = gorgon::fma_seconds((float)data["a"], (float)data["b"], iterations, out2_p);
        out1_p[0] = 2.0 * gorgon::CHAINS * gorgon::LANES * iterations * omp_get_max_threads();
        """,
        data={"iterations": iterations, "a": 0.9995, "b": 0.001},
    )
    return float(operations.numpy()[0]) / float(seconds.numpy()[0]) / 1e9
