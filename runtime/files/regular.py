"""Opens regular files only: a FIFO would wait for a writer, and ``/dev/zero`` never ends."""

from __future__ import annotations

import gzip
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Text packs to a tenth, repeated records to less; only what was made to fill memory unpacks to more than this.
MOST_UNPACKED, FREE_BYTES = 200, 1 << 26


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises ValueError naming one that is not regular, OSError as ``open`` does."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would wait as well
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise ValueError(f"{path} is {KINDS.get(kind, 'no file')}, expected a regular file")
    return open(handle, "rb")


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises ValueError naming one of more than ``most`` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, which is not expected of such a file")
    return content


def read_text(path: str | Path, most: int, encoding: str = "utf-8-sig") -> str:
    """The text of a regular file, without a byte order mark. Raises ValueError naming one that is not UTF-8.
    encoding: "utf-8" keeps a byte order mark."""
    try:
        return read_bytes(path, most).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


class _Unpacked(gzip.GzipFile):
    """Raises ValueError for more bytes than text unpacks to."""

    def __init__(self, file: BinaryIO, path: str | Path):
        super().__init__(fileobj=file)
        self._path, self._taken = path, 0
        self._limit = FREE_BYTES + MOST_UNPACKED * file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self._taken += len(piece)
        if self._taken > self._limit:
            raise ValueError(f"{self._path} unpacks to more than {MOST_UNPACKED} times its size; no text does")
        return piece


def unpacked(file: BinaryIO, path: str | Path) -> BinaryIO:
    """The content of an open file, gzipped or not; read it in pieces."""
    return _Unpacked(file, path) if file.peek(2)[:2] == b"\x1f\x8b" else file
