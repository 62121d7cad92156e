"""Device, ranks and seeds of this process."""

from __future__ import annotations

import random

from runtime import door


def rank() -> int:
    """Index of this process among its peers; 0 outside ``mpirun``."""
    return int(door.jt.rank)


def world_size() -> int:
    """Number of processes of this run; 1 outside ``mpirun``."""
    return int(door.jt.world_size)


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and Jittor alike. All ranks get the same seed: initial weights must agree."""
    import numpy as np  # here, so that the doctor runs where nothing is installed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    door.jt.set_global_seed(seed, different_seed_for_mpi=False)


def synchronize() -> None:
    """Wait until everything launched so far has finished on the device."""
    door.jt.sync_all(True)


def warm() -> None:
    """Call once every kernel has been compiled: turns Jittor's parallel compiler off.

    The compiler costs about 2 microseconds an op and is needed only while kernels are being built.
    """
    door.jt.flags.use_parallel_op_compiler = 0
