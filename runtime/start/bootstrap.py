"""Prepares the start of Jittor 1.3.11, before it is imported.

While it is imported, Jittor reads its settings from the environment, downloads missing parts and, the first time,
compiles its core. This module prepares all of that, so that the import works without a network, with or without a GPU
and with or without ``nvcc`` on the PATH. What is imported is a patched copy (``runtime.start.jittor_source``); with a
GPU, Jittor gets a toolkit folder (``runtime.start.toolkit_folder``).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import signal
import sys
import threading
from pathlib import Path

from runtime.start.choice import Choice, choose_device
from runtime.start.devices import Driver, find_driver
from runtime.start.jittor_source import patched_sources
from runtime.start.onednn import jittor_home, link_onednn, onednn_prefix
from runtime.start.python_config import python_config
from runtime.start.quiet import quiet_file_descriptors
from runtime.start.toolkit import NAMED, find_toolkits
from runtime.start.toolkit_folder import assemble, plan

# How long an OpenMP thread spins at a barrier before it sleeps. With the library's default, about 4 ms, two processes
# that share the cores spin against each other: a pass of 0.2 ms took 338 ms. A single process loses nothing at 2000.
SPIN_COUNT = "2000"
# A CPU-only core would shadow a CUDA one.
CACHE_NAMES = {"cpu": "gorgon-cpu", "cuda": "gorgon-cuda"}


def under_mpi() -> bool:
    """True in a process that ``mpirun`` started (Open MPI)."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ


def threads_per_rank(num_cores: int, allowed: int, num_ranks: int) -> int:
    """OpenMP threads of one of ``num_ranks`` processes that may use ``allowed`` of a machine's ``num_cores``.

    ``mpirun`` binds two ranks to a core each and lets three or more run anywhere: 3 ranks on 2 cores get one each.
    """
    return max(1, min(allowed, num_cores // num_ranks))


def cache_folder() -> Path:
    """Where toolkit folders and patched sources are cached."""
    return jittor_home() / ".cache" / "gorgon"


def core_is_compiled(sources: Path) -> bool:
    """True when the cache holds a core compiled from ``sources``, for this Python and under this cache name; with CUDA
    it is one folder deeper."""
    name = os.environ.get("cache_name", "default")
    key = hashlib.md5(str(sources / "jittor_utils" / "__init__.py").encode()).hexdigest()[:4]  # as Jittor names it
    cache = jittor_home() / ".cache" / "jittor"
    cores = cache.glob(f"jt*/*/py{platform.python_version()}*/**/{key}/**/jittor_core*.so")
    return any(name in (path.parent.name, path.parent.parent.name) for path in cores)


@contextlib.contextmanager
def _default_sigterm():
    """Processes forked inside end at SIGTERM, even while this one defers it (``runtime.interrupt``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if before != signal.SIG_DFL:
            signal.siginterrupt(signal.SIGTERM, False)  # as deferred_interrupts left it


def import_jittor():
    """Import Jittor quietly.

    When Jittor finds its compiler helper outdated, it rebuilds it and exits with status 0, as if the command were done.
    Then this restarts the command, once; a second time raises RuntimeError.
    """
    try:
        with quiet_file_descriptors(), _default_sigterm():
            import jittor
    except SystemExit as error:
        if os.environ.get("GORGON_RESTARTED"):
            raise RuntimeError("Jittor rebuilt itself twice and exited; remove its cache and try again") from error
        os.environ["GORGON_RESTARTED"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    _end_compilers()
    return jittor


def _end_compilers() -> None:
    """End the compiler processes of the import. Ctrl-C would end them, and their pool would then wait for them for ever
    when Python exits. The next compilation starts new ones."""
    import jittor_utils

    if jittor_utils.pool_size:
        atexit.unregister(jittor_utils.pool_cleanup)
        jittor_utils.pool_cleanup()
        jittor_utils.pool_size = 0


def settle_threads() -> None:
    """Set how OpenMP threads wait and, under ``mpirun``, how many there are. The first library with OpenMP that is
    loaded reads this, be it Jittor's kernels or torch; the others then share it."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if under_mpi():
        ranks_here = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        threads = threads_per_rank(os.cpu_count() or 1, len(os.sched_getaffinity(0)), ranks_here)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def import_torch():
    """Import torch into a process that also runs Jittor; returns the module. Both orders work on a CPU; before Jittor
    is better, since torch then gets the OpenMP library it ships.

    Untried: both on one GPU, each with its own CUDA runtime. Raises ValueError when torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--backbone-engine torch needs PyTorch: pip install -r requirements-torch.txt")
    settle_threads()
    return importlib.import_module("torch")


def settle_cuda(choice: Choice) -> None:
    """Give Jittor the chosen toolkit in one folder, and sources that compile with it.

    Only cuBLAS and cuRAND are used; without these settings Jittor wants cuDNN 8 and downloads other libraries.
    """
    os.environ[NAMED] = str(choice.toolkit.nvcc)  # for child processes: nvcc_path now names our wrapper script
    toolkit = assemble(plan(choice.toolkit, choice.capabilities), cache_folder())
    os.environ["nvcc_path"] = str(toolkit / "bin" / "nvcc")
    os.environ["cuda_archs"] = " ".join(map(str, choice.capabilities))
    os.environ.update(conv_opt="1", use_cutt="0", use_cutlass="0")
    if not (os.environ.get("nccl_include_path") and os.environ.get("nccl_lib_path")):
        os.environ["use_nccl"] = "0"


def settle(choice: Choice) -> Path:
    """Set everything that Jittor reads from the environment; returns the folder of the sources that will be imported.
    Raises ImportError where it cannot work."""
    # Always explicit: Jittor stores the last home it was given in a file and silently keeps using it.
    os.environ.setdefault("JITTOR_HOME", str(Path.home()))
    if choice.device == "cuda":
        settle_cuda(choice)
    else:
        os.environ["nvcc_path"] = ""  # with nvcc but no GPU Jittor dies on libcudart.so
    # Without a name Jittor takes the current git branch and compiles its core again for each. A name of ours may have
    # been inherited from the process that started this one.
    if os.environ.get("cache_name") in (None, *CACHE_NAMES.values()):
        os.environ["cache_name"] = CACHE_NAMES[choice.device]
    settle_threads()
    os.environ["FIX_TORCH_ERROR"] = "0"  # otherwise importing Jittor imports torch
    os.environ.setdefault("log_silent", "1")
    if under_mpi():
        os.environ["use_mpi"] = "1"  # not the setting inherited from the process that started mpirun
        if shutil.which("mpicc") is None:
            raise ImportError("mpirun started this, but mpicc is missing: install openmpi-bin and libopenmpi-dev")
    else:
        os.environ.setdefault("use_mpi", "0")
    config = python_config(cache_folder())
    if config:
        os.environ.setdefault("python_config_path", str(config))
    sources = patched_sources(cache_folder())
    sys.path.insert(0, str(sources))
    prefix = onednn_prefix()
    if prefix is None:
        os.environ["use_mkl"] = "0"
        print("oneDNN is not installed: CPU training runs at about a tenth of its speed", file=sys.stderr)
    else:
        link_onednn(prefix)
    return sources


def decide() -> Choice:
    """The device of this process, from ``GORGON_DEVICE``, the driver and the toolkits; raises as ``choose_device``."""
    wanted = os.environ.get("GORGON_DEVICE", "auto")
    return choose_device(wanted, Driver() if wanted == "cpu" else find_driver(), find_toolkits)


def start():
    """Import Jittor with everything prepared; returns (module, device, reason)."""
    if importlib.util.find_spec("jittor") is None:
        raise ImportError("Jittor is not installed: run `make setup`, or pip install -r requirements.txt")
    choice = decide()
    sources = settle(choice)
    if not core_is_compiled(sources):
        print("Compiling Jittor's core for this machine, once; this takes about three minutes ...", file=sys.stderr)
    try:
        jittor = import_jittor()
    except Exception:
        if choice.device == "cuda":
            advice = "run `python -m runtime.doctor` for details, or set GORGON_DEVICE=cpu"
            print(f"Jittor did not start with CUDA: {advice}", file=sys.stderr)
        raise
    # Jittor's own handlers end the process at Ctrl-C, and whenever a child is stopped or killed.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    jittor.flags.use_cuda = int(choice.device == "cuda")
    return jittor, choice.device, choice.reason
