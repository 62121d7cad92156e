"""Decides how Jittor 1.3.11 starts, before it is imported.

Jittor reads its settings from the environment while it is being imported, downloads what it misses, and
compiles its own core on the first import. This module settles all of that up front, so that importing works
with no network, with or without a GPU, and with or without ``nvcc`` on the PATH.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

# The newest CUDA toolkit whose headers Jittor 1.3.11 was written for.
NEWEST_KNOWN_CUDA = 12
# The folder name Jittor 1.3.11 looks for before it tries to download oneDNN.
ONEDNN_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"
# Turns an OpenMP thread waits at a barrier before it sleeps. The library's own choice, about 4 ms, makes two processes
# that share the cores spin against each other: a pass of 0.2 ms then took 338 ms. 2000 cost nothing when alone.
SPIN_COUNT = "2000"


class DeviceError(ValueError):
    """The device that was asked for cannot be used here."""


def count_cuda_devices() -> int:
    """Number of CUDA devices the driver offers; 0 without a driver. Needs no toolkit and no other library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def toolkit_major_version(nvcc: str) -> int | None:
    """Major version of the CUDA toolkit behind ``nvcc``, or None where it does not answer."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.", text)
    return int(match.group(1)) if match else None


def choose_device(wanted: str, num_devices: int, nvcc: str | None, toolkit: int | None) -> tuple[str, str]:
    """The device to run on and the reason, from what the machine has.

    wanted: ``auto``, ``cpu`` or ``cuda``. Raises DeviceError when ``cuda`` is asked for and cannot be had, and
    ValueError for another word.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"GORGON_DEVICE must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cpu":
        return "cpu", "asked for"
    if num_devices == 0:
        reason = "no usable CUDA device"
    elif not nvcc:
        reason = "a CUDA device but no nvcc on the PATH"
    elif toolkit is None or toolkit > NEWEST_KNOWN_CUDA:
        reason = f"the CUDA toolkit is {toolkit}; Jittor 1.3.11 knows up to {NEWEST_KNOWN_CUDA}"
    else:
        return "cuda", f"{num_devices} CUDA device(s), toolkit {toolkit}"
    if wanted == "cuda":
        raise DeviceError(f"GORGON_DEVICE=cuda cannot be served: {reason}")
    return "cpu", reason


def onednn_prefix() -> Path | None:
    """The prefix that the oneDNN wheels were installed under, or None when they are not installed."""
    for prefix in dict.fromkeys([sysconfig.get_path("data"), sys.prefix, sys.base_prefix]):
        root = Path(prefix)
        if (root / "lib" / "libdnnl.so.2").exists() and (root / "include" / "dnnl.hpp").exists():
            return root
    return None


def jittor_home() -> Path:
    """The folder under which Jittor keeps its ``.cache/jittor``."""
    return Path(os.environ.get("JITTOR_HOME") or Path.home())


def link_onednn(prefix: Path) -> None:
    """Put oneDNN where Jittor looks for it, as links, and load it so that its symbols are found.

    Links are replaced when they point at another environment, so two environments do not break each other.
    """
    folder = jittor_home() / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    for link, target in (
        (folder / "include", prefix / "include"),
        (folder / "lib" / "libmkldnn.so", prefix / "lib" / "libdnnl.so.2"),
    ):
        if link.is_symlink() and os.readlink(link) == str(target):
            continue
        if link.exists() and not link.is_symlink():
            continue  # Jittor has downloaded its own copy: as good
        fresh = link.with_name(f"{link.name}.{os.getpid()}")
        fresh.symlink_to(target)
        os.replace(fresh, link)
    ctypes.CDLL(str(prefix / "lib" / "libdnnl.so.2"), mode=ctypes.RTLD_GLOBAL)


def under_mpi() -> bool:
    """True in a process that ``mpirun`` started (Open MPI)."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ


def threads_per_rank(num_cores: int, allowed: int, num_ranks: int) -> int:
    """OpenMP threads of one of ``num_ranks`` processes on a machine, of whose ``num_cores`` it may use ``allowed``.

    ``mpirun`` binds two ranks to a core each and lets three or more run anywhere: 3 ranks on 2 cores get one each.
    """
    return max(1, min(allowed, num_cores // num_ranks))


def core_is_compiled() -> bool:
    """True when Jittor's core for this cache name already lies in the cache."""
    cache = jittor_home() / ".cache" / "jittor"
    name = os.environ.get("cache_name", "default")
    return any(path.parent.name == name for path in cache.glob("jt*/**/jittor_core*.so"))


@contextlib.contextmanager
def quiet_file_descriptors():
    """Send what native code prints to a file; on an error, show its last lines and pass the error on."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-30:]
                sys.stderr.write("\n".join(tail) + "\n")


@contextlib.contextmanager
def _default_sigterm():
    """Processes that are forked within end by SIGTERM, also where this one puts it off (``runtime.interrupt``)."""
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

    When it finds its own compiler helper outdated it rebuilds it and leaves with status 0, as if the command had been
    done. This runs the command again instead, once; a second time raises RuntimeError.
    """
    try:
        with quiet_file_descriptors(), _default_sigterm():
            import jittor
    except SystemExit as error:
        if os.environ.get("GORGON_RESTARTED"):
            raise RuntimeError("Jittor rebuilt itself twice and left; remove its cache and try again") from error
        os.environ["GORGON_RESTARTED"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    _end_compilers()
    return jittor


def _end_compilers() -> None:
    """End the processes that the import compiled with: Ctrl-C reaches them too, and their pool, which looks for them
    when Python exits, would then wait for ever. The next compilation makes new ones."""
    import jittor_utils

    if jittor_utils.pool_size:
        atexit.unregister(jittor_utils.pool_cleanup)
        jittor_utils.pool_cleanup()
        jittor_utils.pool_size = 0


def settle_threads() -> None:
    """How OpenMP's threads wait and, under ``mpirun``, how many there are: read when the first library that brings
    OpenMP is loaded, Jittor's kernels or torch, which then share it."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if under_mpi():
        ranks_here = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        threads = threads_per_rank(os.cpu_count() or 1, len(os.sched_getaffinity(0)), ranks_here)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def import_torch():
    """Import torch into a process that runs Jittor too; returns the module. Called before Jittor starts, where there is
    the choice: both orders work on a CPU, and in this one torch gets the OpenMP library that it brings along.

    Untried: both on one GPU, each with a CUDA runtime of its own. Raises ValueError where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--backbone-engine torch needs PyTorch: pip install -r requirements-torch.txt")
    settle_threads()
    return importlib.import_module("torch")


def start():
    """Import Jittor with everything settled; returns the module and the chosen (device, reason)."""
    if importlib.util.find_spec("jittor") is None:
        raise ImportError("Jittor is not installed: run `make setup`, or pip install -r requirements.txt")
    nvcc = os.environ.get("nvcc_path") or shutil.which("nvcc")
    wanted = os.environ.get("GORGON_DEVICE", "auto")
    num_devices = 0 if wanted == "cpu" else count_cuda_devices()
    toolkit = toolkit_major_version(nvcc) if nvcc and num_devices else None
    device, reason = choose_device(wanted, num_devices, nvcc, toolkit)
    if device == "cpu":
        os.environ["nvcc_path"] = ""  # with nvcc but no GPU Jittor dies on libcudart.so
    # Without a name Jittor takes the git branch it happens to stand in, and compiles its core anew for each; and a
    # CPU-only core would shadow a CUDA one.
    os.environ.setdefault("cache_name", f"gorgon-{device}")
    # Said outright: Jittor writes the last home it was given into a file and goes on using it without being told.
    os.environ.setdefault("JITTOR_HOME", str(Path.home()))
    settle_threads()
    os.environ["FIX_TORCH_ERROR"] = "0"  # otherwise importing Jittor imports torch
    os.environ.setdefault("log_silent", "1")
    if under_mpi():
        os.environ["use_mpi"] = "1"  # not what a process outside, which started mpirun, had settled for itself
        if shutil.which("mpicc") is None:
            raise ImportError("mpirun started this, but mpicc is missing: install openmpi-bin and libopenmpi-dev")
    else:
        os.environ.setdefault("use_mpi", "0")
    prefix = onednn_prefix()
    if prefix is None:
        os.environ["use_mkl"] = "0"
        print("oneDNN is not installed: CPU training runs at about a tenth of its speed", file=sys.stderr)
    else:
        link_onednn(prefix)
    if not core_is_compiled():
        print("Compiling Jittor's core for this machine, once; this takes about three minutes ...", file=sys.stderr)
    jittor = import_jittor()
    # Jittor's own handlers end the process on Ctrl-C, and when any child is stopped or killed.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    jittor.flags.use_cuda = int(device == "cuda")
    return jittor, device, reason
