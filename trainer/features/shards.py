"""Arrays of many sequences on disk in checksummed shards: what a killed writer had finished stays, the rest is written.

A directory holds ``meta.json`` and, for each array and each stretch of whole sequences, a shard and its checksum:

    hidden-00007.f16          (tokens, dim) float16, little endian, rows of the sequences boundaries[7]:boundaries[8]
    hidden-00007.f16.sha256   one line, as sha256sum -c reads it

A shard is written under a temporary name, synced and renamed, then its checksum likewise. So a shard without its
checksum is not there, and one with it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from runtime.atomic import atomic_file, remove_leftovers, sha256_of

FORMAT = 2  # 1 was one file per array, without checksums
# Of a shard. 34 MB at 256 wide, 0.5 GB at 4096: a killed writer loses some seconds of a small backbone's work and
# minutes of a large one's, while the shards of 100 million tokens are still a thousand or two to an array.
SHARD_TOKENS = 65536
# A memory map holds a file descriptor, of which a process usually has 1024; a run reads two caches at once.
OPEN_SHARDS = 256
CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)\n")
EXPONENT = np.uint16(0x7C00)  # all ones in a float16 that is infinite or not a number
# The float32 of each of the 65536 float16: looking a number up takes a third of the time of NumPy's conversion.
FLOAT32_OF = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)

Shard = tuple[str, int]  # the name of an array and the number of the shard


def cut(offsets: np.ndarray, most: int) -> list[int]:
    """Where shards begin, as sequence indices, and the number of sequences at the end. offsets: (count + 1,).

    A shard is closed when the next sequence would take it past ``most`` tokens; a longer one is a shard of its own.
    Lengths 3, 4, 2, 9 with 8 tokens a shard: [0, 2, 3, 4].
    """
    boundaries = [0]
    for index in range(1, len(offsets) - 1):
        if offsets[index + 1] - offsets[boundaries[-1]] > most:
            boundaries.append(index)
    return [*boundaries, len(offsets) - 1]


class ShardStore:
    """A directory of arrays, (tokens, dim) float16 each, all cut at the same sequences. Made by what it is a cache of.

    identity: JSON-ready facts that hold for every array, such as fingerprints and the width; offsets: (sequences + 1,)
    int64, the first token of each sequence. Nothing is written before ``prepare``. Raises ValueError naming meta.json
    when it cannot be read or describes other data.
    """

    def __init__(self, directory: Path, identity: dict, offsets: np.ndarray, dim: int):
        self.directory, self.offsets, self.dim = Path(directory), offsets, dim
        self.meta_path = self.directory / "meta.json"
        self.identity = {"format": FORMAT, "dim": dim, "sequences": len(offsets) - 1, **identity}
        self.boundaries = self._read_meta() if self.meta_path.exists() else cut(offsets, SHARD_TOKENS)
        self._shard_of = np.repeat(np.arange(self.num_shards), np.diff(self.boundaries))
        self._rows = functools.lru_cache(OPEN_SHARDS)(self._map)

    @property
    def num_shards(self) -> int:
        """Shards of an array."""
        return len(self.boundaries) - 1

    def sequences(self, index: int) -> range:
        """The sequences of a shard."""
        return range(self.boundaries[index], self.boundaries[index + 1])

    def num_rows(self, index: int) -> int:
        """Tokens of a shard."""
        return int(self.offsets[self.boundaries[index + 1]] - self.offsets[self.boundaries[index]])

    def num_bytes(self, shards: Iterable[Shard]) -> int:
        """What these shards take on disk."""
        return sum(self.num_rows(index) * self.dim * 2 for _, index in shards)

    def path(self, shard: Shard) -> Path:
        """Where a shard lies."""
        return self.directory / f"{shard[0]}-{shard[1]:05d}.f16"

    def is_there(self, shard: Shard) -> bool:
        """Whether the shard was written to its end."""
        path = self.path(shard)
        return path.exists() and _checksum_path(path).exists()

    def present(self, names: Sequence[str]) -> set[Shard]:
        """The shards of these arrays that are there."""
        return {shard for shard in self.all(names) if self.is_there(shard)}

    def all(self, names: Sequence[str]) -> list[Shard]:
        """The shards of these arrays, there or not, in the order in which they are written."""
        return [(name, index) for index in range(self.num_shards) for name in names]

    # Describing -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the directory ready to be written: meta.json stands, what writers that died left is gone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.directory)
        if not self.meta_path.exists():
            content = json.dumps({**self.identity, "shards": self.boundaries}, indent=1) + "\n"
            with _told_of_full_disk(self.meta_path, len(content)):
                _write_text(self.meta_path, content)

    def _read_meta(self) -> list[int]:
        path, again = self.meta_path, "delete it to have it written anew"
        try:
            meta = json.loads(path.read_text())
        except ValueError as error:  # broken JSON, or bytes that are not text
            raise ValueError(f"{path} is damaged: not valid JSON ({error}); {again}") from error
        if not isinstance(meta, dict):
            raise ValueError(f"{path} is damaged: it holds {meta!s:.40}, expected an object; {again}")
        for key, expected in self.identity.items():
            if key not in meta or meta[key] != expected:
                raise ValueError(
                    f"{self.directory} is a cache of other data: {key} in {path.name} is {meta.get(key)}, expected "
                    f"{expected}; delete the directory to have it written anew, or use another --cache-dir"
                )
        shards = meta.get("shards")
        whole = isinstance(shards, list) and all(type(edge) is int for edge in shards)
        if not whole or [*shards[:1], *shards[-1:]] != [0, len(self.offsets) - 1] or not _ascending(shards):
            raise ValueError(f"{path} is damaged: shards must ascend from 0 to the number of sequences; {again}")
        return shards

    # Checking -------------------------------------------------------------------------------------------------------

    def verify(self, shards: Iterable[Shard]) -> None:
        """Compare size and SHA-256 of these shards, several at a time. Raises ValueError naming the damaged ones."""
        shards = sorted(shards)
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "verify") as threads:
            damaged = [problem for problem in threads.map(self._problem, shards) if problem]
        if damaged:
            raise ValueError("; ".join(damaged))

    def _problem(self, shard: Shard) -> str | None:
        path = self.path(shard)
        checksum = _checksum_path(path)
        with contextlib.suppress(UnicodeDecodeError):
            line = CHECKSUM_LINE.fullmatch(checksum.read_text())
            if line and line[2] == path.name:
                return self._mismatch(path, self.num_bytes([shard]), line[1])
        return f"{checksum} is damaged: expected a SHA-256 and {path.name}; delete it to have the shard written anew"

    @staticmethod
    def _mismatch(path: Path, num_bytes: int, expected: str) -> str | None:
        again = "delete it to have it written anew"
        size = path.stat().st_size
        if size != num_bytes:
            return f"{path} is damaged: it has {size} bytes, expected {num_bytes}; {again}"
        found = sha256_of(path)  # in blocks, off Python's lock
        return (
            None if found == expected else f"{path} is damaged: its checksum is {found}, expected {expected}; {again}"
        )

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self, name: str, sequences: Sequence[int], out: np.ndarray) -> None:
        """Rows of these sequences, one behind the other, into ``out``: (tokens, dim) float32, or float16 as they lie on
        disk, of exactly that size."""
        done = 0
        for sequence in sequences:
            index = int(self._shard_of[sequence])
            begin = int(self.offsets[sequence] - self.offsets[self.boundaries[index]])
            length = int(self.offsets[sequence + 1] - self.offsets[sequence])
            bits = self._rows(name, index)[begin : begin + length]
            if out.dtype == np.float16:
                out[done : done + length] = bits.view(np.float16)
            else:
                np.take(FLOAT32_OF, bits, out=out[done : done + length], mode="wrap")  # the mode that needs no check
            done += length
        assert done == len(out), (done, out.shape)

    def _map(self, name: str, index: int) -> np.ndarray:
        path, shape = self.path((name, index)), (self.num_rows(index), self.dim)
        return np.memmap(path, np.uint16, "r", shape=shape).view(np.ndarray)  # a memmap's slices are slow to make


def _ascending(values: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


# Writing -------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Converts, writes and hashes rows on a thread of its own while its caller computes the next ones.

    One piece waits at most: ``put`` first waits for the piece before, and raises what went wrong with it. Leaving the
    ``with`` waits for the last piece; leaving it by an error removes the shards in flight. Whole shards stay.
    """

    def __init__(self, store: ShardStore):
        self.store, self.written = store, set()
        self._thread = ThreadPoolExecutor(1, "shards")
        self._waiting: Future | None = None
        self._open: dict[Shard, _Partial] = {}

    def put(self, index: int, parts: dict[str, np.ndarray], first: int) -> None:
        """The next rows of shard ``index``, those of whole sequences from ``first`` on, by array: (rows, dim) float32.

        A shard that has all its rows is closed. Raises ValueError, here or later, when float16 cannot hold a number or
        the disk is full.
        """
        self._wait()
        self._waiting = self._thread.submit(self._write, index, parts, first)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()
            for partial in self._open.values():
                partial.discard()

    def _wait(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting:
            waiting.result()

    def _write(self, index: int, parts: dict[str, np.ndarray], first: int) -> None:
        store = self.store
        for name, rows in parts.items():
            shard = (name, index)
            values = to_float16(rows, name, store.offsets, first)
            with _told_of_full_disk(store.path(shard), store.num_bytes([shard])):
                if shard not in self._open:
                    self._open[shard] = _Partial(store.path(shard))
                self._open[shard].write(values)
                if self._open[shard].num_bytes < store.num_bytes([shard]):
                    continue
                if store.is_there(shard):  # another process was faster, with the same rows
                    self._open[shard].discard()
                else:
                    self._open[shard].publish()
                    self.written.add(shard)
                del self._open[shard]


def to_float16(rows: np.ndarray, name: str, offsets: np.ndarray, first: int) -> np.ndarray:
    """rows (rows, dim) float32, those of the sequences from ``first`` on, in float16. Raises ValueError naming the
    sequence of a number that float16 cannot hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = rows.astype("<f2")
    unfit = (values.view(np.uint16) & EXPONENT) == EXPONENT
    if unfit.any():
        row, column = np.argwhere(unfit)[0]
        sequence = int(np.searchsorted(offsets, offsets[first] + row, "right")) - 1
        value = f"{rows[row, column]:g}"
        raise ValueError(f"sequence {sequence}: {name} holds {value}, outside float16; use --features online")
    return values


class _Partial:
    """A shard that is being written."""

    def __init__(self, path: Path):
        self.path, self.digest, self.num_bytes = path, hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(open(stack.enter_context(atomic_file(path)), "wb", buffering=0))
            self.stack = stack.pop_all()

    def write(self, values: np.ndarray) -> None:
        block = values.reshape(-1).view(np.uint8)
        write_all(self.file, block)
        self.digest.update(block)
        self.num_bytes += len(block)

    def publish(self) -> None:
        self.stack.close()
        try:
            _write_text(_checksum_path(self.path), f"{self.digest.hexdigest()}  {self.path.name}\n")
        except OSError:
            self.path.unlink(missing_ok=True)  # without a checksum it only takes room
            raise

    def discard(self) -> None:
        """Close the file and remove it, as ``atomic_file`` does when its body fails."""
        with contextlib.suppress(_Discarded), self.stack:
            raise _Discarded


class _Discarded(Exception):
    """Leaves the body of an ``atomic_file`` without publishing it."""


def write_all(file, block) -> None:
    """Write all of a block of bytes to an unbuffered file, which may take it in pieces."""
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _told_of_full_disk(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns the system's word for a full disk or quota into a ValueError with what is needed and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"the disk is full: {path} takes {num_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; make room and "
            "start again (whole shards are kept), or use another --cache-dir or --features online"
        ) from error


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial, open(partial, "wb", buffering=0) as file:
        write_all(file, text.encode())


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
