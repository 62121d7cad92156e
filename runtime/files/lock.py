"""A folder that one process writes at a time. The system's lock ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from runtime.atomic import HOST

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep a folder to this process, which makes it. Raises ValueError naming the process that has it."""
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {HOST}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile finds that it is gone, and tries again
        os.close(handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError as error:
            holder = os.pread(handle, 100, 0).decode(errors="replace") or "unknown"
            os.close(handle)
            raise ValueError(
                f"{path.parent} is being written by another process, {holder}; wait for it or choose another --out"
            ) from error
        os.close(handle)
