"""A patched copy of Jittor 1.3.11: without its compiler's data race, and for CUDA 13 too.

The installed package never changes: a copy in the cache, with a few places replaced, is imported. Each patch states
its reason, and one that does not apply is an error: another version of Jittor needs another look.

The race: before a graph runs, Jittor loads its new kernels in up to seven threads, and the threads change the graph.
A matrix product gets its oneDNN call as a new operation (``opt/tuner/matmul_tuner.cc``), linked to inputs that products
in other threads share, and unlinked again (``opt/var_relay.cc``), which also adds it to a vector of all threads.
Nothing guarded that; tests/runtime/start/test_race.py makes it corrupt the heap. Now one thread at a time works on the
graph, and the others wait or run the C++ compiler, so a cold start still uses all cores.

CUDA 13.0 compiles the copy (``python -m runtime.doctor --compile``, tests/runtime/test_nvcc.py); CUDA 11 and 12 should,
from reading; no GPU has run it yet.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from runtime.atomic import atomic_directory
from runtime.files.documents import identity

WRITTEN_FOR = "1.3.11.0"
PACKAGES = ("jittor", "jittor_utils")


class SourceError(ValueError):
    """The installed Jittor is not the version that the patches were written for."""


@dataclass(frozen=True)
class Patch:
    """``old``, which occurs in ``file`` (relative to site-packages) exactly once, becomes ``new``."""

    file: str
    why: str
    old: str
    new: str


PATCHES = (
    Patch(
        "jittor/src/jit_compiler.h",
        "a lock for the graph, and a scope in which its holder leaves the graph to others",
        "namespace jit_compiler {\n",
        """namespace jit_compiler {
extern std::mutex graph;
extern thread_local bool holds_graph;
struct WithGraph {
    WithGraph() { graph.lock(); holds_graph = true; }
    ~WithGraph() { holds_graph = false; graph.unlock(); }
};
struct WithoutGraph {
    WithoutGraph() { if (holds_graph) graph.unlock(); }
    ~WithoutGraph() { if (holds_graph) graph.lock(); }
};
""",
    ),
    Patch(
        "jittor/src/jit_compiler.h",
        "for the lock",
        '#include "common.h"\n',
        '#include "common.h"\n#include <mutex>\n',
    ),
    Patch(
        "jittor/src/jit_compiler.cc",
        "the lock itself",
        "std::mutex dl_open_mutex;\n",
        "std::mutex dl_open_mutex;\nstd::mutex graph;\nthread_local bool holds_graph = false;\n",
    ),
    Patch(
        "jittor/src/jit_compiler.cc",
        "the C++ compiler needs no graph",
        "    cache_compile(cmd, cache_path, jittor_path);\n    auto jit_entry",
        "    { WithoutGraph scope; cache_compile(cmd, cache_path, jittor_path); }\n    auto jit_entry",
    ),
    Patch(
        "jittor/src/parallel_compiler.cc",
        "the threads' work on one kernel changes the graph",
        "            bool is_fused_op = rid<0;\n            try {\n",
        "            bool is_fused_op = rid<0;\n            jit_compiler::WithGraph scope;\n            try {\n",
    ),
    Patch(
        "jittor/src/parallel_compiler.cc",
        "for the lock",
        '#include "op_compiler.h"\n',
        '#include "op_compiler.h"\n#include "jit_compiler.h"\n',
    ),
    Patch(
        "jittor/utils/asm_tuner.py",
        "a kernel's compilation starts this script, which took jittor_utils from whatever environment it ran in",
        "import jittor_utils as jit_utils\n",
        "sys.path.insert(0, os.path.abspath(os.path.join(__file__, '../../..')))\nimport jittor_utils as jit_utils\n",
    ),
    Patch(
        "jittor/compiler.py",
        "the interpreter is part of each kernel's command: environments of one interpreter share kernels",
        "python_path = sys.executable\n",
        "python_path = os.path.realpath(sys.executable)\n",
    ),
    Patch(
        "jittor/extern/cuda/inc/helper_cuda.h",
        "CUDA 13 dropped clockRate and computeMode from cudaDeviceProp; nothing calls these helpers",
        "#ifdef __CUDA_RUNTIME_H__\n// General GPU Device CUDA Initialization\n",
        "#if defined(__CUDA_RUNTIME_H__) && CUDART_VERSION < 13000\n// General GPU Device CUDA Initialization\n",
    ),
    Patch(
        "jittor/src/misc/cuda_limits.h",
        "npp.h belongs to a library that is not needed otherwise; only eight limits of it are used",
        "#ifdef IS_CUDA\n#include <npp.h>\n#include <math_constants.h>\n#else\n#include <limits>\n",
        "#ifdef IS_CUDA\n#include <math_constants.h>\n#else\n#include <limits>\n"
        "#define     CUDART_INF_F  std::numeric_limits<float>::infinity()\n"
        "#define     CUDART_INF    std::numeric_limits<double>::infinity()\n#endif\n",
    ),
    Patch(
        "jittor/src/misc/cuda_limits.h",
        "the same limits, now for every compiler",
        "#define     CUDART_INF_F  std::numeric_limits<float>::infinity()\n"
        "#define     CUDART_INF    std::numeric_limits<double>::infinity()\n#endif\n\n\n",
        "\n",
    ),
    Patch(
        "jittor/extern/cuda/cub/ops/cub_where_op.cc",
        "CCCL 3 (CUDA 13) dropped cub's iterators; thrust has had the same since CUDA 11",
        "#include <thrust/transform.h>\n",
        "#include <thrust/transform.h>\n#include <thrust/iterator/counting_iterator.h>\n"
        "#include <thrust/iterator/transform_iterator.h>\n",
    ),
    Patch(
        "jittor/extern/cuda/cub/ops/cub_where_op.cc",
        "the iterators themselves",
        "    cub::CountingInputIterator<To> counting_itr(0);\n"
        "    cub::TransformInputIterator<bool, NonZeroOp<Ti>, Ti*> itr(cond->ptr<Ti>(), NonZeroOp<Ti>());\n",
        "    thrust::counting_iterator<To> counting_itr(0);\n"
        "    auto itr = thrust::make_transform_iterator(cond->ptr<Ti>(), NonZeroOp<Ti>());\n",
    ),
    Patch(
        "jittor/other/code_softmax.py",
        "CCCL 3 (CUDA 13) dropped cub::Max",
        "Reduce(v1, cub::Max());",
        "Reduce(v1, [](float a, float b) {{ return ::max(a, b); }});",
    ),
    Patch(
        "jittor/src/misc/cuda_flags.cc",
        "without a driver the call fails and leaves -1, which counts as devices",
        "        cudaGetDeviceCount(&count);\n    return count;\n",
        "        if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;\n    return count;\n",
    ),
    Patch(
        "jittor/compiler.py",
        "code for 9.0 does not run on 10.0 and later, which CUDA 12.8 and later know; start.choice asks nvcc",
        "    max_arch = 90\n",
        "    max_arch = 999\n",
    ),
    Patch(
        "jittor_utils/install_cuda.py",
        "a CUDA that Jittor once downloaded would restart the process to take precedence over nvcc_path",
        '    if "nvcc_path" in os.environ and os.environ["nvcc_path"] == "":\n',
        '    if "nvcc_path" in os.environ:\n',
    ),
)


def installed_sources() -> Path:
    """The folder that holds the installed ``jittor`` and ``jittor_utils``, also where a copy was imported."""
    try:
        return Path(str(metadata.distribution("jittor").locate_file("")))
    except metadata.PackageNotFoundError as error:
        raise ImportError("Jittor is not installed: run `make setup`, or pip install -r requirements.txt") from error


def jittor_version() -> str:
    """The installed version, from its metadata; raises ``importlib.metadata.PackageNotFoundError`` without any."""
    return metadata.version("jittor")


def apply_patches(folder: Path, patches: tuple[Patch, ...] = PATCHES, version: str = WRITTEN_FOR) -> None:
    """Apply the patches to the copy at ``folder``. Raises SourceError where a text does not occur exactly once."""
    for patch in patches:
        path = folder / patch.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(patch.old) != 1:
            line = patch.old.strip().splitlines()[0]
            raise SourceError(
                f"Jittor {version} is not the {WRITTEN_FOR} that its patches were written for: {patch.file} holds "
                f"{line!r} {text.count(patch.old)} times where 1 was expected ({patch.why}); "
                f"pip install jittor=={WRITTEN_FOR}"
            )
        path.write_text(text.replace(patch.old, patch.new), encoding="utf-8")


def _contents_key(patches: tuple[Patch, ...]) -> str:
    """Hash of the sources and the patches. pip's RECORD holds a hash of every installed file."""
    record = metadata.distribution("jittor").read_text("RECORD") or jittor_version()
    described = identity([record, [asdict(patch) for patch in patches]])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def patched_sources(cache: Path, patches: tuple[Patch, ...] = PATCHES) -> Path:
    """The folder of the patched copy inside ``cache``, made if it does not exist; its name is a hash of its content.

    Several processes may call this at once: each writes its own, and one of the equal copies stays. Raises SourceError.
    """
    directory = cache / f"jittor-{_contents_key(patches)}"
    if not directory.exists():
        source = installed_sources()
        with atomic_directory(directory) as partial:
            for package in PACKAGES:
                shutil.copytree(source / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
            apply_patches(partial, patches, jittor_version())
            os.sync()  # a copy torn by a power failure would look complete
    return directory
