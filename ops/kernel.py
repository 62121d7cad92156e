"""Turns a kernel source file into a ``jt.code`` call: a body for the CPU, one for CUDA, and the CUDA body emulated.

Jittor's compile key holds the text it is given, not the files that the text includes. So the text names the files and
a hash of their content: the key stays short, and an edited kernel is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

import runtime
from runtime import jt

KERNELS = Path(__file__).resolve().parent / "kernels"
_emulating = False


def _include(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(b"".join((KERNELS / name).read_bytes() for name in names)).hexdigest()
    return "".join(f'#include "{KERNELS / name}"\n' for name in names) + f"// {digest[:16]}\n"


@functools.cache
def cpu_header(*names: str) -> str:
    """The text that includes files of ``ops/kernels``, and what they need, in a body for the CPU."""
    return _include(("storage.h", "vector.h", "cpu.h", *names))


@functools.cache
def cuda_header(names: tuple[str, ...], emulated: bool) -> str:
    """The same for files in ``ops/kernels/cuda``, in the order of their needs: Jittor does not follow their
    includes."""
    first = "emulator.h" if emulated else "device.h"
    return _include(("storage.h", "plan.h", *(f"cuda/{name}" for name in (first, "reduce.h", *names))))


def on_cpu() -> bool:
    """Whether the CPU bodies run, and weights are packed for them; otherwise the CUDA bodies do."""
    return runtime.device == "cpu" and not _emulating


@contextlib.contextmanager
def emulated_cuda():
    """Inside, the CUDA bodies run on the CPU, one thread at a time (``ops/kernels/cuda/emulator.h``): slow, for tests.

    Objects that pack weights for kernels have to be made and used inside.
    """
    global _emulating
    before, _emulating = _emulating, True
    try:
        yield
    finally:
        _emulating = before


def launch(shapes, dtypes, inputs, *, cpu: str, cuda: str, cpu_files=(), cuda_files=(), data=None):
    """One kernel call; returns its output Vars, or the one Var where ``shapes`` is a single shape.

    cpu, cuda: C++ text with Jittor's names for inputs and outputs, which calls what the files define in namespace
    ``gorgon``. cpu_files: files of ``ops/kernels`` beside ``cpu.h``; cuda_files: files of ``ops/kernels/cuda``. data:
    {name: number}.
    """
    data = data or {}
    if on_cpu():
        return jt.code(shapes, dtypes, inputs, cpu_header=cpu_header(*cpu_files), cpu_src=cpu, data=data)
    header = cuda_header(tuple(cuda_files), _emulating)
    if _emulating:
        return jt.code(shapes, dtypes, inputs, cpu_header=header, cpu_src=cuda, data=data)
    return jt.code(shapes, dtypes, inputs, cuda_header=header, cuda_src=cuda, data=data)


def cuda_in_place(inputs: list, cuda: str, cuda_files, data=None) -> None:
    """Run a CUDA body that writes into its inputs and has no CPU body. Its one output exists because a call needs one.
    Pending readers of the old values have to be synced before."""
    launch((1,), "int32", inputs, cpu='#error "for CUDA alone"', cuda=cuda, cuda_files=cuda_files, data=data).sync()
