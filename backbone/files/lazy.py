"""Tensors in files: type and shape are known, the numbers are read on demand, all of them or some rows at a time.

Whatever loads or converts weights passes these along, so that a stretch of one tensor is all that is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Shape = tuple[int, ...]
MOST_REASON = 300  # characters of what a library says, which may quote the file
BLOCK_BYTES = 1 << 24  # 16 MiB: converting a block takes several times that, still little next to the interpreter


class Refused(ValueError):
    """The file is readable and holds something that does not belong in a weights file."""


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a file that could not be read or was refused, with the reason."""
    reason = (str(error) or type(error).__name__)[:MOST_REASON]
    if isinstance(error, Refused):
        return ValueError(f"{path} is not loaded: {reason}")
    return ValueError(f"{path} cannot be read as weights: {reason}. If it is truncated or damaged, fetch it again")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read.

    read_rows(start, stop) gives rows start to stop of the first axis, contiguous; a scalar is one row of shape ().
    It raises ValueError naming the file when that is damaged.
    """

    dtype: np.dtype
    shape: Shape
    read_rows: Callable[[int, int], np.ndarray]

    @property
    def num_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All rows."""
        return self.read_rows(0, self.num_rows)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks of rows that cover all rows, each of at most BLOCK_BYTES or one row."""
        row_bytes = max(1, self.nbytes // max(1, self.num_rows))
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """All of it, stretch after stretch."""
        for start, stop in self.stretches():
            yield self.read_rows(start, stop)


def in_memory(array: np.ndarray) -> LazyTensor:
    """An array under the same interface."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes a scalar (1,)
    return LazyTensor(array.dtype, array.shape, lambda start, stop: array[start:stop] if array.shape else array)


def finite(name: str, tensor: LazyTensor) -> LazyTensor:
    """The tensor; reading raises ValueError naming it where a number is not finite."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = tensor.read_rows(start, stop)
        check_finite(name, rows)
        return rows

    return LazyTensor(tensor.dtype, tensor.shape, read_rows)


def check_finite(name: str, numbers: np.ndarray) -> None:
    """Raises ValueError naming a tensor with numbers that are not finite: nothing computed with it means anything."""
    bad = int(np.size(numbers) - np.count_nonzero(np.isfinite(numbers)))
    if bad:
        raise ValueError(f"{name} holds {bad} number(s) that are not finite (nan or infinite); check the file")


def contiguous_stride(shape: Shape) -> Shape:
    """Elements from one index to the next along each axis, last axis fastest: (2, 3, 4) -> (12, 4, 1)."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def stored(
    path: Path,
    dtype: np.dtype,
    shape: Shape,
    offset: int,
    stride: Shape | None = None,
    check: Callable[[], None] | None = None,
) -> LazyTensor:
    """Numbers in a file: element (i, j, ...) is ``offset`` bytes and ``i * stride[0] + j * stride[1] + ...`` numbers
    from its start; the default stride is contiguous. ``check`` runs before every read and may raise ValueError.

    Only the part that is read is mapped into memory, and only while it is copied.
    """
    stride = contiguous_stride(shape) if stride is None else stride

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = (stop - start, *shape[1:]) if shape else ()
        if 0 in rows:
            return np.empty(rows, dtype)
        first = start * stride[0] if shape else 0
        last = first + sum((size - 1) * step for size, step in zip(rows, stride, strict=True))
        try:
            if check is not None:
                check()
            place = offset + first * dtype.itemsize
            data = np.memmap(path, np.uint8, "r", place, ((last - first + 1) * dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
        steps = [step * dtype.itemsize for step in stride]
        return np.array(np.lib.stride_tricks.as_strided(data.view(dtype), rows, steps, writeable=False), order="C")

    return LazyTensor(dtype, shape, read_rows)


def join_rows(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts joined along the first axis. Raises ValueError where other axes or types differ."""
    _check_alike(parts, [part.shape[1:] for part in parts])
    ends = np.cumsum([part.num_rows for part in parts])

    def read_rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for part, end in zip(parts, ends.tolist(), strict=True):
            begin = end - part.num_rows
            if begin < stop and start < end:
                pieces.append(part.read_rows(max(start, begin) - begin, min(stop, end) - begin))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return LazyTensor(parts[0].dtype, (int(ends[-1]), *parts[0].shape[1:]), read_rows)


def join_columns(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices joined along the second axis. Raises ValueError where numbers of rows or types differ."""
    _check_alike(parts, [part.shape[:1] for part in parts])

    def read_rows(start: int, stop: int) -> np.ndarray:
        pieces = [part.read_rows(start, stop) for part in parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    return LazyTensor(parts[0].dtype, (parts[0].shape[0], sum(part.shape[1] for part in parts)), read_rows)


def _check_alike(parts: Sequence[LazyTensor], shapes: Sequence[Shape]) -> None:
    if len({part.dtype for part in parts}) > 1 or len(set(shapes)) > 1:
        found = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise ValueError(f"its shards do not fit together: {found}")


def map_rows(tensor: LazyTensor, group: int, change: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
    """Rows rearranged within groups of ``group``: change (groups * group, ...) -> the same shape, group by group."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        first, last = start // group * group, min(-(-stop // group) * group, tensor.num_rows)
        return np.ascontiguousarray(change(tensor.read_rows(first, last))[start - first : stop - first])

    return LazyTensor(tensor.dtype, tensor.shape, read_rows)
