"""Folders that appear whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of renameat2(2)


def sha256_of(path: Path) -> str:
    """Hash of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE
    )


def _take_free_place(partial: Path, directory: Path) -> bool:
    """False where there is such a folder, were it made by another process this very moment."""
    if directory.exists():
        return False
    try:
        os.rename(partial, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _swap_in(partial: Path, directory: Path) -> None:
    if not _take_free_place(partial, directory) and not _exchange(partial, directory):
        # Between these two renames there is no such folder: the price of a file system that cannot exchange.
        retired = partial.with_name(f"{partial.name}.old")
        os.rename(directory, retired)
        os.rename(partial, directory)
        shutil.rmtree(retired)


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``directory`` once the body is done; on an error nothing changes.

    Its files are on the disk before it does, so that not even a power failure leaves a torn one. What a killed process
    of the same name left behind is removed.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.*.partial"):
        if not Path(f"/proc/{leftover.suffixes[-2][1:]}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _swap_in(partial, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
