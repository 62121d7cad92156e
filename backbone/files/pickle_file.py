"""Reads a ``.pkl`` of NumPy arrays, as ``jittor.save`` writes it, without trusting it and without loading it.

The unpickler knows arrays and containers and nothing else. Long runs of bytes stay in the file: only their places are
recorded, and they are mapped into memory when an array's rows are read.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from backbone.files.lazy import LazyTensor, Refused, contiguous_stride, damaged, in_memory, stored
from backbone.files.unpickle import Described, RestrictedUnpickler

# jittor.save ends a file with the sha1 of what comes before, and this.
MAGIC = b"HCAJSLHD"
CHECKSUM_BYTES = hashlib.sha1().digest_size + len(MAGIC)
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before version 1.6 begins with this number
DTYPES = frozenset(
    f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes
)
CHECKED_AT_ONCE = 1 << 22  # bytes
READ_AT_ONCE = 1 << 16  # shorter runs of bytes are read at once; CPython writes longer ones outside its frames


class _Bytes(NamedTuple):
    """A run of bytes that was left in the file."""

    offset: int
    length: int


class _Dtype(Described):
    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in DTYPES:
            raise Refused(f"it holds an array of type {code!r:.80}; expected numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        match state:
            case (int(), "<" | "|" | "=", None, None, None, *_):
                return
        raise Refused("it holds an array of big-endian or composite numbers; expected plain little-endian ones")


class _Ndarray(Described):
    """Placeholder for the class numpy.ndarray, which pickles of arrays name."""

    __slots__ = ()


class _Array(Described):
    """An array: shape, type, whether the first axis is the fastest one, and its bytes or their place in the file."""

    __slots__ = ("state",)

    def __init__(self, *_: Any) -> None:
        self.state: tuple = ()

    def build(self, state: Any) -> None:
        match state:
            case (int(), tuple(shape), _Dtype() as dtype, fortran, bytes() | _Bytes() as data):
                if any(type(size) is not int or size < 0 for size in shape):
                    raise Refused(f"it holds an array of shape {shape!r:.80}")
                length = data.length if isinstance(data, _Bytes) else len(data)
                if length != math.prod(shape) * dtype.dtype.itemsize:
                    raise Refused(f"it holds an array of shape {shape} and type {dtype.dtype} in {length} bytes")
                self.state = (shape, dtype.dtype, bool(fortran), data)
            case _:
                raise Refused("it holds an array that is not a block of numbers")


class _ArrayUnpickler(RestrictedUnpickler):
    known = RestrictedUnpickler.known | {
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,  # as NumPy 2 spells it
        ("jittor", "jittor_core.Var"): lambda array: array,  # a Var is pickled as its array
    }
    dispatch = type(RestrictedUnpickler.dispatch)(RestrictedUnpickler.dispatch)

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)
        self._file, self._size = file, size

    def _load_bytes(self, length: int) -> None:
        if length <= READ_AT_ONCE or self._unframer.current_frame:
            self.append(self.read(length))
            return
        offset = self._file.tell()
        if offset + length > self._size:
            raise Refused(f"it ends {offset + length - self._size} bytes too early: it is truncated")
        self._file.seek(length, 1)
        self.append(_Bytes(offset, length))

    def load_binbytes(self) -> None:
        self._load_bytes(struct.unpack("<I", self.read(4))[0])

    def load_binbytes8(self) -> None:
        self._load_bytes(struct.unpack("<Q", self.read(8))[0])

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8


class _Checksum:
    """The sha1 at the end of a file, compared once, before the first numbers are read."""

    def __init__(self, path: Path) -> None:
        self._path, self._checked = path, False

    def __call__(self) -> None:
        if self._checked:
            return
        with open(self._path, "rb") as file:
            left = file.seek(0, 2) - CHECKSUM_BYTES
            file.seek(max(left, 0))
            end = file.read()
            if left > 0 and end.endswith(MAGIC):
                file.seek(0)
                digest = hashlib.sha1()
                while data := file.read(min(left, CHECKED_AT_ONCE)):
                    digest.update(data)
                    left -= len(data)
                if digest.digest() != end[: -len(MAGIC)]:
                    raise ValueError("its checksum does not match its content")
        self._checked = True


def _tensor(path: Path, array: _Array, check: _Checksum) -> LazyTensor:
    if not array.state:
        raise Refused("it holds an array without numbers")
    shape, dtype, fortran, data = array.state
    if isinstance(data, bytes):
        return in_memory(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C"))
    stride = contiguous_stride(shape[::-1])[::-1] if fortran else None
    return stored(path, dtype, shape, data.offset, stride, check)


def _plain(value: Any, path: Path) -> Any:
    """A value without arrays, its bytes fetched from the file."""
    if isinstance(value, _Bytes):
        with open(path, "rb") as file:
            file.seek(value.offset)
            return file.read(value.length)
    if isinstance(value, dict):
        return {key: _plain(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, path) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item, path) for item in value)
    if isinstance(value, Described):
        raise Refused("it holds arrays inside other containers; expected a flat dict of arrays")
    return value


# What a damaged or hostile pickle makes the unpickler raise.
PICKLE_ERRORS = (
    pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError,
    OverflowError, MemoryError, RecursionError, struct.error,
)  # fmt: skip


def open_pickle_file(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The arrays of a pickled dict by name, and its other entries (numbers, text, containers of them).

    Raises ValueError naming the file when it is damaged, or when its pickle names anything but arrays of numbers and
    containers. A wrong checksum of jittor.save raises when numbers are read.
    """
    path = Path(path)
    check = _Checksum(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            content = _ArrayUnpickler(file, size).load()
        if content == TORCH_MAGIC:
            raise Refused("torch wrote it before version 1.6; load it with torch and save it again")
        if not isinstance(content, dict):
            raise Refused(f"it holds a {type(content).__name__}, expected a dict of arrays")
        tensors: dict[str, LazyTensor] = {}
        rest: dict[str, Any] = {}
        for name, value in content.items():
            if not isinstance(name, str):
                raise Refused(f"it has an entry {name!r:.80}, expected names")
            if isinstance(value, _Array):
                tensors[name] = _tensor(path, value, check)
            else:
                rest[name] = _plain(value, path)
        return tensors, rest
    except PICKLE_ERRORS as error:
        raise damaged(path, error) from error
