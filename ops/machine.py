"""How fast this machine reads, copies and multiplies: the bounds that a kernel's time is held against.

On the CPU all threads that the kernels use take part, and the clock runs inside the kernel, so that no launch is
counted. On CUDA the clock is the device's, and two events a few microseconds apart at best bound what runs between
them: give it work for a millisecond.
"""

from __future__ import annotations

from pathlib import Path

from ops.kernel import launch, on_cpu
from runtime.types import Var

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
HEADER = "machine.h"
MOST_BLOCKS = 4096  # as in ops/kernels/cuda/machine.h
FACTOR, ADDEND = 0.9995, 0.001  # of the multiply-adds, whose results then stay between 0 and some tens


def _launch(shapes, dtypes, inputs: list, cpu: str, cuda: str, data: dict | None = None):
    """A kernel call with a text for each body."""
    options = dict(cpu=cpu, cuda=cuda, cpu_files=[HEADER], cuda_files=[HEADER], data=data)
    return launch(shapes, dtypes, inputs, **options)


def _cuda_numbers(call: str, num: int = 1, data: dict | None = None) -> list[float]:
    """What a call gives in so many outputs of one float64 each; for CUDA alone. One more, float32, is its scratch."""
    if on_cpu():
        raise ValueError("only a GPU has this measure, got the CPU; run with GORGON_DEVICE=cuda")
    shapes, dtypes = [(1,)] * (num + 1), ["float64"] * num + ["float32"]
    *found, _ = _launch(shapes, dtypes, [], '#error "for CUDA alone"', call, data)
    return [float(value.numpy()[0]) for value in found]


def last_level_cache_bytes(caches: Path = CACHES) -> int | None:
    """Bytes of the largest cache of the first core, which its neighbours may share, or of a GPU's second-level cache;
    None where the system does not report it.

    Linux reports it in files: ``index3/size`` holds "32768K".
    """
    if not on_cpu():
        return int(_cuda_numbers("gorgon::keep(gorgon::cache_bytes(), out0_p);")[0])
    sizes = [path.read_text().strip() for path in sorted(caches.glob("index*/size"))]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS), default=None)


def num_threads() -> int:
    """Threads that a kernel runs with; on CUDA the device's multiprocessors."""
    if not on_cpu():
        return int(_cuda_numbers("gorgon::keep(gorgon::multiprocessors(), out0_p);")[0])
    return int(_launch((1,), "int32", [], "out0_p[0] = omp_get_max_threads();", "").numpy()[0])


def read_gb_s(buffer, sweeps: int = 1) -> float:
    """Gigabytes per second, 1e9 bytes, of reading a buffer ``sweeps`` times. buffer: (count,) float32, computed.

    One sweep over a buffer much larger than the caches measures the memory, many over a small one the cache.
    """
    return 4 * buffer.shape[0] * sweeps / read(buffer, sweeps)[0] / 1e9


def read(buffer, sweeps: int) -> tuple[float, float]:
    """(seconds, the sum of everything that was read). On the CPU less than 512 elements a thread at the end are left
    out; on CUDA a cache that holds the buffer is warm, and the first-level caches hold none of it."""
    shapes, dtypes = [(1,), (1,)], ["float64", "float32"]
    if not on_cpu():
        shapes, dtypes = [*shapes, (MOST_BLOCKS,)], [*dtypes, "float32"]
    seconds, total, *_ = _launch(
        shapes,
        dtypes,
        [buffer],
        'out0_p[0] = gorgon::read_seconds(in0_p, in0_shape0, (int64_t)data["sweeps"], out1_p);',
        """
        int64_t sweeps = (int64_t)data["sweeps"];
        gorgon::keep(gorgon::read_seconds(in0_p, in0_shape0, sweeps, out2_p, out1_p), out0_p);
        """,
        {"sweeps": sweeps},
    )
    return float(seconds.numpy()[0]), float(total.numpy()[0])


def copy_gb_s(source) -> float:
    """Gigabytes per second of copying into memory that was written before; what is read and what is written both
    count. source: (count,) float32, computed."""
    return 8 * source.shape[0] / copy(source)[0] / 1e9


def copy(source) -> tuple[float, Var]:
    """(seconds of the second copy into the same place, the copy)."""
    seconds, target = _launch(
        [(1,), tuple(source.shape)],
        ["float64", "float32"],
        [source],
        """
        gorgon::copy_seconds(in0_p, in0_shape0, out1_p);
        out0_p[0] = gorgon::copy_seconds(in0_p, in0_shape0, out1_p);
        """,
        "gorgon::keep(gorgon::copy_seconds(in0_p, in0_shape0, out1_p), out0_p);",
    )
    return float(seconds.numpy()[0]), target


def fma_gflop_s(iterations: int) -> float:
    """1e9 operations per second of fused multiply-adds in float32, two operations each, in registers."""
    seconds, operations, _ = _launch(
        [(1,), (1,), (1,)],
        ["float64", "float64", "float32"],
        [],
        """
        int64_t iterations = (int64_t)data["iterations"];
        out0_p[0] = gorgon::fma_seconds((float)data["a"], (float)data["b"], iterations, out2_p);
        out1_p[0] = 2.0 * gorgon::CHAINS * gorgon::LANES * iterations * omp_get_max_threads();
        """,
        """
        int64_t iterations = (int64_t)data["iterations"];
        gorgon::keep(gorgon::fma_seconds((float)data["a"], (float)data["b"], iterations, out2_p), out0_p);
        gorgon::keep(gorgon::fma_operations(iterations), out1_p);
        """,
        {"iterations": iterations, "a": FACTOR, "b": ADDEND},
    )
    return float(operations.numpy()[0]) / float(seconds.numpy()[0]) / 1e9


def mma_tflop_s(iterations: int) -> float:
    """1e12 operations per second of ``mma.m16n8k16`` on halves with sums in float32, two operations a product; what the
    kernels multiply with. Devices of compute capability 9.0 have faster instructions, which the kernels do not use.
    Raises ValueError on the CPU."""
    return multiply_halves(1.0, iterations)[0]


def multiply_halves(value: float, iterations: int) -> tuple[float, float]:
    """(1e12 operations per second, what a warp adds up, which is 16 value^2 an iteration)."""
    seconds, operations, total = _cuda_numbers(
        """
        int64_t iterations = (int64_t)data["iterations"];
        gorgon::keep(gorgon::mma_seconds((float)data["value"], iterations, out3_p), out0_p);
        gorgon::keep(gorgon::mma_operations(iterations), out1_p);
        gorgon::keep_as_double(out3_p, out2_p);
        """,
        3,
        {"value": value, "iterations": iterations},
    )
    return operations / seconds / 1e12, total


def launch_us(launches: int = 500, ahead: int = 100_000) -> tuple[float, float]:
    """Microseconds of launching a kernel that does nothing: (of the host, until the call returns; of the device, from
    one to the next, while the host is far ahead).

    ahead: fused multiply-adds of each chain that keep the device busy until all are launched, which should take
    milliseconds; launches: fewer than the driver queues, a thousand. Raises ValueError on the CPU.
    """
    call = """
    gorgon::launch_seconds((int64_t)data["launches"], (int64_t)data["ahead"], out2_p, out0_p, out1_p);
    """
    host, device = _cuda_numbers(call, 2, {"launches": launches, "ahead": ahead})
    return host * 1e6, device * 1e6
