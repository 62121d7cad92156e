"""Arrays of many sequences on disk, in checksummed shards, so that a killed writer is resumed after its last shard.

A directory holds ``meta.json`` and, for each array and each run of complete sequences, a shard and its checksum:

    hidden-00007.f16          (tokens, dim) float16, little endian, rows of the sequences boundaries[7]:boundaries[8]
    hidden-00007.f16.sha256   one line, as sha256sum -c reads it

A shard is written atomically, then its checksum. A shard without its checksum does not count; one with it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from runtime.atomic import atomic_file, remove_leftovers, sha256_of, write_file
from runtime.files.documents import read_json, write_json

FORMAT = 2  # 1 was one file per array, without checksums
# Of a shard: 34 MB at width 256, 0.5 GB at 4096. A killed writer loses some seconds of a small backbone's work and
# minutes of a large one's, and 100 million tokens are a thousand or two shards per array.
SHARD_TOKENS = 65536
# A memory map holds a file descriptor, of which a process usually has 1024; a run reads two caches at once.
OPEN_SHARDS = 256
CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)\n")
EXPONENT = np.uint16(0x7C00)  # all ones in a float16 that is infinite or not a number
# The float32 of each of the 65536 float16: a lookup takes a third of the time of NumPy's conversion.
FLOAT32_OF = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
REWRITE = "delete it to have it written again"

Shard = tuple[str, int]  # the name of an array and the number of the shard


def cut(offsets: np.ndarray, most: int) -> list[int]:
    """Where parts begin, as sequence indices, and the number of sequences at the end. offsets: (count + 1,).

    A part is closed when the next sequence would take it past ``most`` tokens; a longer one is a part of its own.
    Lengths 3, 4, 2, 9 with 8 tokens a part: [0, 2, 3, 4].
    """
    boundaries = [0]
    for index in range(1, len(offsets) - 1):
        if offsets[index + 1] - offsets[boundaries[-1]] > most:
            boundaries.append(index)
    return [*boundaries, len(offsets) - 1]


class ShardStore:
    """A directory of arrays, (tokens, dim) float16 each, all cut at the same sequences.

    identity: JSON-ready facts that hold for every array, such as fingerprints; offsets: (sequences + 1,) int64, the
    first token of each sequence. Nothing is written before ``prepare``. Raises ValueError naming meta.json when it
    cannot be read or describes other data.
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
        """The file of a shard."""
        return self.directory / f"{shard[0]}-{shard[1]:05d}.f16"

    def is_complete(self, shard: Shard) -> bool:
        """Whether a shard and its checksum were written."""
        path = self.path(shard)
        return path.exists() and _checksum_path(path).exists()

    def all(self, names: Sequence[str]) -> list[Shard]:
        """The shards of these arrays, complete or not, in the order in which they are written."""
        return [(name, index) for index in range(self.num_shards) for name in names]

    def present(self, names: Sequence[str]) -> set[Shard]:
        """The complete shards of these arrays."""
        return {shard for shard in self.all(names) if self.is_complete(shard)}

    def prepare(self) -> None:
        """Make the directory ready to be written: write meta.json and remove what killed writers left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.directory)
        if not self.meta_path.exists():
            write_json(self.meta_path, {**self.identity, "shards": self.boundaries}, indent=1)

    def _read_meta(self) -> list[int]:
        path = self.meta_path
        try:
            meta = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; {REWRITE}") from error
        if not isinstance(meta, dict):
            raise ValueError(f"{path} is damaged: it holds {meta!s:.40}, expected an object; {REWRITE}")
        for key, expected in self.identity.items():
            if key not in meta or meta[key] != expected:
                raise ValueError(
                    f"{self.directory} is a cache of other data: {key} in {path.name} is {meta.get(key)}, expected "
                    f"{expected}; delete the directory to have it written again, or use another --cache-dir"
                )
        shards = meta.get("shards")
        integers = isinstance(shards, list) and all(type(edge) is int for edge in shards)
        ascending = integers and all(a < b for a, b in pairwise(shards))
        if not ascending or [*shards[:1], *shards[-1:]] != [0, len(self.offsets) - 1]:
            raise ValueError(f"{path} is damaged: shards must ascend from 0 to the number of sequences; {REWRITE}")
        return shards

    def verify(self, shards: Iterable[Shard]) -> None:
        """Compare size and SHA-256 of these shards, several at a time. Raises ValueError naming the damaged ones."""
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "verify") as threads:
            damaged = [problem for problem in threads.map(self._problem, sorted(shards)) if problem]
        if damaged:
            raise ValueError("; ".join(damaged))

    def _problem(self, shard: Shard) -> str | None:
        path, num_bytes = self.path(shard), self.num_bytes([shard])
        checksum = _checksum_path(path)
        line = CHECKSUM_LINE.fullmatch(checksum.read_text(errors="replace"))
        if not line or line[2] != path.name:
            return f"{checksum} is damaged: expected a SHA-256 and {path.name}; delete it to have the shard rewritten"
        if (size := path.stat().st_size) != num_bytes:
            return f"{path} is damaged: it has {size} bytes, expected {num_bytes}; {REWRITE}"
        if (found := sha256_of(path)) != line[1]:  # hashed in blocks, without Python's lock
            return f"{path} is damaged: its checksum is {found}, expected {line[1]}; {REWRITE}"
        return None

    def read(self, name: str, sequences: Sequence[int], out: np.ndarray) -> None:
        """Copy the rows of these sequences, one after another, to ``out``: (tokens, dim) float32 or float16, of exactly
        that size."""
        done = 0
        for sequence in sequences:
            index = int(self._shard_of[sequence])
            begin = int(self.offsets[sequence] - self.offsets[self.boundaries[index]])
            length = int(self.offsets[sequence + 1] - self.offsets[sequence])
            bits = self._rows(name, index)[begin : begin + length]
            if out.dtype == np.float16:
                out[done : done + length] = bits.view(np.float16)
            else:
                np.take(FLOAT32_OF, bits, out=out[done : done + length], mode="wrap")  # the mode without a check
            done += length
        assert done == len(out), (done, out.shape)

    def _map(self, name: str, index: int) -> np.ndarray:
        path, shape = self.path((name, index)), (self.num_rows(index), self.dim)
        return np.memmap(path, np.uint16, "r", shape=shape).view(np.ndarray)  # slices of a memmap are slow to make


# Writing -------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Converts, writes and hashes rows on its own thread while its caller computes the next ones.

    At most one piece waits: ``put`` first waits for the piece before, and raises what went wrong with it. Leaving the
    ``with`` waits for the last piece; leaving it by an error removes unfinished shards.
    """

    def __init__(self, store: ShardStore):
        self.store, self.written = store, set()
        self._thread = ThreadPoolExecutor(1, "shards")
        self._waiting: Future | None = None
        self._open: dict[Shard, _Partial] = {}

    def put(self, index: int, parts: dict[str, np.ndarray], first: int) -> None:
        """Write the next rows of shard ``index``: by array, (rows, dim) float32, of complete sequences from ``first``.

        A shard that has all its rows is closed. Raises ValueError, in this call or a later one, when float16 cannot
        hold a number, OSError when the disk is full.
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
            if shard not in self._open:
                self._open[shard] = _Partial(store.path(shard))
            self._open[shard].write(values)
            if self._open[shard].num_bytes < store.num_bytes([shard]):
                continue
            if store.is_complete(shard):  # another process was faster, with the same rows
                self._open[shard].discard()
            else:
                self._open[shard].publish()
                self.written.add(shard)
            del self._open[shard]


def to_float16(rows: np.ndarray, name: str, offsets: np.ndarray, first: int) -> np.ndarray:
    """rows (rows, dim) float32, of the sequences from ``first`` on, in float16. Raises ValueError naming the sequence
    of a number that float16 cannot hold."""
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
            self.file = stack.enter_context(open(stack.enter_context(atomic_file(path)), "wb"))
            self.stack = stack.pop_all()

    def write(self, values: np.ndarray) -> None:
        block = values.reshape(-1).view(np.uint8)
        self.file.write(block)
        self.digest.update(block)
        self.num_bytes += len(block)

    def publish(self) -> None:
        self.stack.close()
        try:
            write_file(_checksum_path(self.path), f"{self.digest.hexdigest()}  {self.path.name}\n")
        except OSError:
            self.path.unlink(missing_ok=True)  # without a checksum it only takes room
            raise

    def discard(self) -> None:
        """Remove the file, as ``atomic_file`` does when its body fails."""
        with contextlib.suppress(_Discarded), self.stack:
            raise _Discarded


class _Discarded(Exception):
    """Leaves the body of an ``atomic_file`` without publishing it."""


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
