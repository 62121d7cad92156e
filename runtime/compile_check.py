"""Compiles the CUDA build of Jittor's core where there is no GPU, and runs one product on the CPU with it.

    python -m runtime.compile_check 80 90        # compute capabilities; `python -m runtime.doctor --compile` calls this

It shows that the toolkit found by ``runtime.start.toolkit`` and the sources patched by ``runtime.start.jittor_source``
compile, link and load, and that a core with CUDA runs on a machine without a driver. It says nothing about what a GPU
would compute. The build has a cache of its own; it takes minutes the first time and seconds afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from runtime.entry import Parser, run_entry
from runtime.files.documents import parse_json, to_json
from runtime.start.bootstrap import import_jittor, settle
from runtime.start.choice import Choice
from runtime.start.toolkit import WHEELS, Toolkit, find_toolkits, remedy

CACHE_NAME = "gorgon-cuda-check"
CAPABILITIES = (80, 90)
TIMEOUT_S = 1800


def usable_toolkit() -> Toolkit:
    """The first complete toolkit. Raises ValueError naming what is missing."""
    toolkits = find_toolkits()
    for toolkit in toolkits:
        if not toolkit.problems:
            return toolkit
    if not toolkits:
        raise ValueError(f"no nvcc on the PATH; {WHEELS}")
    raise ValueError(f"{toolkits[0].problems[0]}; {remedy(toolkits[0])}")


def begin(capabilities: Sequence[int] = CAPABILITIES):
    """Import the CUDA build of Jittor in this process, device or not; returns the module. Once per process.

    Raises ValueError where the toolkit is incomplete or does not compile for a capability.
    """
    toolkit = usable_toolkit()
    unknown = sorted(set(capabilities) - set(toolkit.codes)) if toolkit.codes else []
    if unknown:
        raise ValueError(f"nvcc does not compile for {unknown}; it knows {list(toolkit.codes)}")
    os.environ["cache_name"] = CACHE_NAME
    os.environ["use_cuda_host_allocator"] = "0"  # pinned memory wants a driver
    settle(Choice("cuda", "compiled without a device", "", toolkit, tuple(sorted(set(capabilities)))))
    return import_jittor()


def main(arguments: Sequence[str]) -> int:
    """What the child process does: print one line of JSON."""
    parser = Parser(prog="runtime.compile_check", description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", type=int, default=list(CAPABILITIES), help="80 90 for 8.0 and 9.0")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    jt = begin(options.capabilities)
    jt.flags.use_cuda = 0
    product = jt.matmul(jt.full((3, 4), 2.0), jt.full((4, 5), 3.0)).numpy()
    found = {
        "nvcc": jt.flags.nvcc_path,
        "cuda_archs": list(jt.flags.cuda_archs),
        "core_has_cuda": bool(jt.compiler.is_cuda),
        "libraries": [name for name in ("cublas", "curand", "cub") if getattr(jt.compile_extern, name, None)],
        "devices": jt.get_device_count(),
        "product": product.tolist(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(to_json(found))
    return 0


def compile_core(capabilities: Sequence[int] = CAPABILITIES) -> dict:
    """Run the check in a child process; returns what ``main`` prints.

    Raises ValueError when something is missing, and when the compilation fails, with the last lines of its output.
    """
    usable_toolkit()
    words = [sys.executable, "-m", "runtime.compile_check", *map(str, capabilities)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise ValueError(f"the CUDA build of Jittor failed: {' | '.join(done.stderr.splitlines()[-30:])}")
    return parse_json(done.stdout.splitlines()[-1], "runtime.compile_check")


if __name__ == "__main__":
    sys.exit(run_entry(main))
