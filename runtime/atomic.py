"""Files and folders that appear complete or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of renameat2(2)
HOST = socket.gethostname()  # on a shared file system a process id alone names nobody


def sha256_of(path: Path) -> str:
    """Hash of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """Where this process writes what will become ``path``."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.partial")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes of this host left when they were killed while writing ``name``, by default anything."""
    for leftover in folder.glob(f".{name}.{HOST}.*.partial"):
        if not Path(f"/proc/{leftover.suffixes[-2][1:]}").exists():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; the file replaces ``path`` when the body ends, and on an error nothing changes.

    The folder is made. The file is on the disk before it is renamed, so that a power failure leaves no torn one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    partial = partial_path(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically. Raises OSError naming it; what was there before is then untouched."""
    with naming(path), atomic_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def check_writable(path: str | Path) -> None:
    """Make sure that ``path`` can be written, before the work whose result goes there. Makes its folder.

    Raises OSError saying what is in the way.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        trial = partial_path(path)
        trial.touch()
        trial.unlink()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turns an OSError of the body into one whose message names the file, with the same errno."""
    try:
        yield
    except OSError as error:
        named = OSError(f"cannot write {path}: {error.strerror or error}")
        named.errno = error.errno
        raise named from error


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill, which replaces ``directory`` when the body ends; on an error nothing changes.

    Its files are on the disk before it is renamed, so that a power failure leaves no torn one.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory.parent, directory.name)
    partial = partial_path(directory)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _swap_in(partial, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap_in(partial: Path, directory: Path) -> None:
    if not _take_free_place(partial, directory) and not _exchange(partial, directory):
        # Between these two renames there is no such folder: the price of a file system that cannot exchange.
        retired = partial.with_name(f"{partial.name}.old")
        os.rename(directory, retired)
        os.rename(partial, directory)
        shutil.rmtree(retired)


def _take_free_place(partial: Path, directory: Path) -> bool:
    """False where the folder exists, even if another process has only just made it."""
    if directory.exists():
        return False
    try:
        os.rename(partial, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
