"""How a kernel source file becomes a ``jt.code`` call.

Jittor's compile key holds the text it is given, not the files that text includes. So the text names the files
and a hash of their content: the key stays short, and an edited kernel is compiled anew.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import runtime

KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def cpu_header(name: str = "cpu.h") -> str:
    """The ``cpu_header`` argument that makes ``ops/kernels/<name>`` visible to a kernel body."""
    names = dict.fromkeys(["vector.h", "cpu.h", name])
    digest = hashlib.sha256(b"".join((KERNELS / each).read_bytes() for each in sorted(names))).hexdigest()
    return "".join(f'#include "{KERNELS / each}"\n' for each in names) + f"// {digest[:16]}\n"


def on_cpu() -> bool:
    """True where the CPU bodies serve; elsewhere the plain-Jittor references do."""
    return runtime.device == "cpu"
