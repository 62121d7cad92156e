"""Reads what ``torch.save`` wrote, without torch and without trusting it.

Such a file is a zip with a pickle inside, and a pickle is a program: ours is read by an unpickler that knows how to
describe tensors and nothing else, so that a hostile file ends in a ValueError.
"""

from __future__ import annotations

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

STORAGE_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Refused(ValueError):
    """The file is readable and holds something that a weights file must not hold."""


class _Storage(NamedTuple):
    """A record ``data/<key>`` of the archive: ``numel`` numbers of one type. Immutable, because pickles may assign."""

    key: str
    dtype_name: str
    numel: int


class _StoredTensor(NamedTuple):
    """A view of a storage: element (i, j, ...) is number ``offset + i * stride[0] + j * stride[1] + ...``."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


class _TensorUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors. Every global that is not needed for that raises."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.describe
        if module == "torch" and name in STORAGE_DTYPES:
            return name
        raise _Refused(
            f"its pickle asks for {module}.{name}, which is not part of a tensor; "
            "a weights file needs none of that: do not trust it, ask for safetensors"
        )

    def persistent_load(self, saved_id: Any) -> _Storage:
        match saved_id:
            case ("storage", str(dtype_name), str(key), _, int(numel)) if dtype_name in STORAGE_DTYPES:
                return _Storage(key, dtype_name, numel)
        raise _Refused(f"its pickle refers to {saved_id!r:.80}, expected a tensor storage")

    def describe(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _StoredTensor:
        return _StoredTensor(storage, offset, shape, stride)


def _check_view(tensor: _StoredTensor) -> None:
    """Raises ValueError for a view that leaves its storage, or has more elements than it (a trick to fill memory)."""
    storage, offset, shape, stride = tensor
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Refused("a tensor is described with other things than whole numbers")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    numel = math.prod(shape)
    if numel and (last >= storage.numel or numel > storage.numel):
        raise _Refused(f"a tensor of shape {shape} and stride {stride} does not fit its storage of {storage.numel}")


def _read_storage(archive: zipfile.ZipFile, root: str, storage: _Storage) -> np.ndarray:
    dtype = STORAGE_DTYPES[storage.dtype_name]
    data = archive.read(f"{root}data/{storage.key}")
    if len(data) < storage.numel * dtype.itemsize:
        raise _Refused(f"storage {storage.key} has {len(data)} bytes, expected {storage.numel} x {dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype, count=storage.numel)


def _torch_tensors(path: Path) -> Iterator[tuple[str, _StoredTensor, zipfile.ZipFile, str]]:
    """The state dict of one file: name, description, and the open archive with the folder its records lie in."""
    with zipfile.ZipFile(path) as archive:
        # A compressed record could unpack to any size; torch never compresses.
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise _Refused(f"record {packed[0]} is compressed; torch stores records as they are")
        pickles = [name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused(f"it holds {len(pickles)} data.pkl records, expected one")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are not little-endian")
        with archive.open(pickles[0]) as file:
            state = _TensorUnpickler(file).load()
        if not isinstance(state, dict):
            raise _Refused(f"it holds a {type(state).__name__}, expected a state dict")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, _StoredTensor):
                raise _Refused(f"entry {name!r:.80} is a {type(tensor).__name__}, expected a flat dict of tensors")
            _check_view(tensor)
            yield name, tensor, archive, root


def damaged(path: Path, error: Exception) -> ValueError:
    """The error that names a file which could not be read, or was refused, and says why."""
    if isinstance(error, _Refused):
        return ValueError(f"{path} is not loaded: {error}")
    reason = str(error) or type(error).__name__
    return ValueError(f"{path} cannot be read as weights: {reason}. If it is truncated or damaged, fetch it again")


# What a damaged or hostile archive makes zipfile and pickle raise.
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError,
    OSError, NotImplementedError, RuntimeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


def read_torch_file(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a state dict saved by ``torch.save`` (``*.bin``, ``*.pth``), in its order, contiguous.

    Raises ValueError naming the file when it is damaged, not in torch's zip format (torch before 1.6; save it again),
    or when its pickle asks for anything but tensors.
    """
    path = Path(path)
    held: tuple[_Storage, np.ndarray] | None = None  # tied tensors share a storage: read it once
    reader = _torch_tensors(path)
    while True:
        try:
            name, tensor, archive, root = next(reader)
            if held is None or held[0] != tensor.storage:
                held = (tensor.storage, _read_storage(archive, root, tensor.storage))
            numbers = held[1][tensor.offset :]
            bytes_per_step = [step * numbers.itemsize for step in tensor.stride]
            view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, bytes_per_step, writeable=False)
        except StopIteration:
            return
        except _ARCHIVE_ERRORS as error:
            raise damaged(path, error) from error
        yield name, np.array(view, order="C")


def torch_shapes(path: Path) -> dict[str, Shape]:
    """Shape of every tensor of such a file, without reading its numbers. Raises ValueError as read_torch_file does."""
    try:
        return {name: tensor.shape for name, tensor, _, _ in _torch_tensors(path)}
    except _ARCHIVE_ERRORS as error:
        raise damaged(path, error) from error
