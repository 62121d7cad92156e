"""Freed memory returns to the system at once while weights are loaded."""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt, and the values that glibc's own adjustment converges to on 64-bit systems.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
AT_ONCE, LATER = 1 << 20, 32 << 20


@contextlib.contextmanager
def freed_at_once():
    """Inside, arrays of 1 MiB and more get pages of their own, so that temporary copies do not stay in the heap (0.3
    times the weights of a 110 M model). Afterwards the heap keeps them for reuse again, which is faster. Does nothing
    where the C library has no ``mallopt``."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, AT_ONCE)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, LATER)
        mallopt(TRIM_THRESHOLD, 2 * LATER)
