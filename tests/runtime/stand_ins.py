"""Libraries that stand in for CUDA's (fake_cuda.c): one device of compute capability 9.0 on which nothing happens.

With them preloaded, Jittor on a machine without a GPU generates CUDA source, nvcc compiles it, and kernels are launched
that do nothing. What comes out is meaningless; that it comes out is the test.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from runtime.start.toolkit import NAMED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARIES = {"cudart": "PART_CUDART", "cublas": "PART_CUBLAS", "curand": "PART_CURAND"}
# What a process that started Jittor has settled for itself.
SETTLED = ("nvcc_path", "cache_name", "cuda_archs", "GORGON_DEVICE", "use_cuda_host_allocator", NAMED)


def _build(soname: str, part: str, header: Path, folder: Path) -> str:
    versions, library = folder / f"{soname}.map", folder / soname
    versions.write_text(f"{soname} {{ global: *; }};\n")
    words = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-D{part}", f"-I{header}", f"-Wl,-soname,{soname}"]
    words += [f"-Wl,--version-script={versions}", "-o", str(library), str(HERE / "fake_cuda.c")]
    subprocess.run(words, check=True)
    return str(library)


def build_libraries(folder: Path, toolkit) -> list[str]:
    """The stand-ins, under the names and symbol versions of the libraries of a ``runtime.start.toolkit.Toolkit``."""
    built, header = [], toolkit.parts["cudart"].header
    for name, part in LIBRARIES.items():
        major = toolkit.parts[name].major
        soname = f"lib{name}.so.{major}" if (name, major) != ("cudart", 11) else "libcudart.so.11.0"
        built.append(_build(soname, part, header, folder))
    return built


def build_driver(folder: Path, toolkit) -> str:
    """A driver that offers the device."""
    return _build("libcuda.so.1", "PART_CUDA", toolkit.parts["cudart"].header, folder)


def preloading(libraries: list[str]) -> dict[str, str]:
    """The environment of a process with the libraries in it."""
    inherited = {key: value for key, value in os.environ.items() if key not in SETTLED}
    return inherited | {"LD_PRELOAD": " ".join(libraries), "PYTHONPATH": str(ROOT)}
