"""Large arrays that are freed go back to the system at once, while weights are loaded."""

from __future__ import annotations

import contextlib
import ctypes

# mallopt's parameters and what glibc's own adjustment ends at on 64-bit systems.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
AT_ONCE, LATER = 1 << 20, 32 << 20


@contextlib.contextmanager
def given_back_at_once():
    """Within, arrays from 1 MiB on have pages of their own, so that the copies which loading makes do not stay in the
    heap: 0.3 times a 110 M model's weights. Afterwards such arrays are kept for reuse again, which is faster. Does
    nothing where the C library has no ``mallopt``."""
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
