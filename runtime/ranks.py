"""The processes of an ``mpirun``: how they are started, sums, broadcasts, a common end.

All ranks call these functions in the same order; with one process they cost nothing. Jittor's MPI operations
carry float32, float64 and int32 only, on a GPU through NCCL (which nobody has run with this project yet).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import runtime
from runtime.start.bootstrap import under_mpi

if TYPE_CHECKING:  # imported in the functions: the doctor runs without it
    import numpy as np


def start_ranks(num_ranks: int) -> int:
    """Run this command as ``num_ranks`` processes on this machine; returns their status.

    ``mpirun`` answers Ctrl-C by killing the ranks a second later, whatever they are writing. So it runs in a session of
    its own, where no key reaches it, and the ranks are sent the signal instead. Raises ValueError without Open MPI.
    """
    import psutil  # here, so that the doctor runs where nothing is installed

    if shutil.which("mpirun") is None:
        raise ValueError("--ranks needs Open MPI (Debian: openmpi-bin libopenmpi-dev)")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    words = ["mpirun", "--quiet", *root, "--oversubscribe", "-np", str(num_ranks), sys.executable, *sys.orig_argv[1:]]
    received: list[int] = []
    mpirun = None

    def forward(number: int, frame: object = None) -> None:
        received.append(number)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            for process in (mpirun.children() or [mpirun]) if mpirun else ():
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    mpirun = psutil.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    if received:  # before there was anything to send it to
        forward(received[0])
    status = mpirun.wait()
    # Ranks that have not begun to listen end with 1, as far as mpirun says.
    return 128 + received[0] if received and status == 1 else status


def all_reduce_sum(var):
    """The sum over all ranks of a float32 or int32 Var of one shape; the Var itself when there is one rank."""
    return var if runtime.world_size() == 1 else var.mpi_all_reduce("add")


def sum_arrays(array: np.ndarray) -> np.ndarray:
    """The sum over all ranks of a NumPy array of one shape, float64 or int32."""
    if runtime.world_size() == 1:
        return array
    import numpy as np

    assert array.dtype in (np.float64, np.int32), array.dtype
    flat = runtime.jt.array64(array.reshape(-1)) if array.dtype == np.float64 else runtime.jt.array(array.reshape(-1))
    return flat.mpi_all_reduce("add").numpy().reshape(array.shape)


def barrier() -> None:
    """Wait until every rank has reached this call."""
    import numpy as np

    sum_arrays(np.ones(1, np.int32))


def share_from_main(parameters: list) -> None:
    """Broadcast the values of rank 0. parameters: float32 or int32 Vars, changed in place."""
    if runtime.world_size() > 1:
        for parameter in parameters:
            parameter.update(parameter.mpi_broadcast(0))
        runtime.jt.sync(parameters)


def text_from_main(text: str) -> str:
    """The text of rank 0, on every rank."""
    if runtime.world_size() == 1:
        return text
    import numpy as np

    raw = text.encode() if runtime.is_main() else b""
    size = int(sum_arrays(np.array([len(raw)], np.int32))[0])
    numbers = np.frombuffer(raw.ljust(size, b"\0"), np.uint8).astype(np.int32)
    return bytes(sum_arrays(numbers).astype(np.uint8)).decode()


def leave(status: int) -> None:
    """End this rank at once after an error: the others may be waiting for it, and an orderly exit would wait for them.
    ``mpirun`` sees the status and ends the others with a message. Does nothing outside ``mpirun`` or for status 0."""
    if status and under_mpi():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
