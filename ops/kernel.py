"""How a kernel source file becomes a ``jt.code`` call: a body for the CPU, one for CUDA, and the second one emulated.

Jittor's compile key holds the text it is given, not the files that text includes. So the text names the files
and a hash of their content: the key stays short, and an edited kernel is compiled anew.
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
    """The header text that makes files of ``ops/kernels`` visible to a body for the CPU, after what they need."""
    return _include(("vector.h", "cpu.h", *names))


@functools.cache
def cuda_header(names: tuple[str, ...], emulated: bool) -> str:
    """The same of files in ``ops/kernels/cuda``, each behind what it needs: Jittor does not follow their includes."""
    first = "emulator.h" if emulated else "device.h"
    return _include(tuple(f"cuda/{name}" for name in (first, "reduce.h", *names)))


def on_cpu() -> bool:
    """True where the CPU bodies serve, and weights are packed for them; elsewhere the CUDA bodies do."""
    return runtime.device == "cpu" and not _emulating


@contextlib.contextmanager
def emulated_cuda():
    """Within, the CUDA bodies serve on the CPU, a thread at a time (``ops/kernels/cuda/emulator.h``): slow, for tests.

    Whatever packs weights for its kernels has to be made and used within.
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
    """Run a CUDA body that writes into its inputs, of which there is none for the CPU. The one output is there because
    a call needs one; what waits to read the old values has to be synced before."""
    launch((1,), "int32", inputs, cpu='#error "for CUDA alone"', cuda=cuda, cuda_files=cuda_files, data=data).sync()
