"""Reads files of ``torch.save`` without torch and without trusting them.

Such a file is a zip with a pickle inside and one record of plain numbers per storage. The pickle is read by an
unpickler that can describe tensors and nothing else; the numbers are mapped into memory from the file, since torch
does not compress them.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from backbone.files.lazy import LazyTensor, Refused, Shape, damaged, stored
from backbone.files.unpickle import Described, RestrictedUnpickler

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
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: signature, ..., lengths of its name and its extra field
CHECKED_AT_ONCE = 1 << 22  # bytes


class _Storage(NamedTuple):
    """A record ``data/<key>`` of the archive: ``numel`` numbers of one type."""

    key: str
    dtype_name: str
    numel: int


class _View(NamedTuple):
    """Element (i, j, ...) is number ``offset + i * stride[0] + j * stride[1] + ...`` of a storage."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


class _Tensor(Described):
    """A tensor in a pickle. Its view is checked when the pickle has been read."""

    __slots__ = ("view",)

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> None:
        self.view = (storage, offset, shape, stride)


class _TensorUnpickler(RestrictedUnpickler):
    known = RestrictedUnpickler.known | {
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        **{("torch", name): name for name in STORAGE_DTYPES},
    }

    def persistent_load(self, saved_id: Any) -> _Storage:
        match saved_id:
            case ("storage", str(dtype_name), str(key), _, int(numel)) if dtype_name in STORAGE_DTYPES:
                return _Storage(key, dtype_name, numel)
        raise Refused(f"its pickle refers to {saved_id!r:.80}, expected a tensor storage")


def _checked_view(storage: Any, offset: Any, shape: Any, stride: Any) -> _View:
    """Raises Refused for a view that leaves its storage, or has more elements than it (a trick to fill memory)."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor's offset, shape or stride is not made of whole numbers")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    numel = math.prod(shape)
    if numel and (last >= storage.numel or numel > storage.numel):
        raise Refused(f"a tensor of shape {shape} and stride {stride} does not fit its storage of {storage.numel}")
    return _View(storage, offset, tuple(shape), tuple(stride))


class _Record:
    """The place of a record of the archive in the file: ``offset`` and ``size`` in bytes."""

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            end = file.seek(0, 2)
        self.path, self.name, self.size, self.crc = path, info.filename, info.file_size, info.CRC
        self.offset = info.header_offset + LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or self.offset + self.size > end:
            raise Refused(f"record {self.name} is not inside the file")
        self._checked = False

    def check(self) -> None:
        """Raises ValueError when the checksum does not match. The file is read once."""
        if self._checked:
            return
        crc, left = 0, self.size
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            while left and (data := file.read(min(left, CHECKED_AT_ONCE))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != self.crc:
            raise ValueError(f"Bad CRC-32 for record {self.name}")
        self._checked = True


def _state_dict(archive: zipfile.ZipFile) -> tuple[str, dict[str, _View]]:
    """The folder of the records, and the tensors by name."""
    names = archive.namelist()
    repeated = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if repeated:
        raise Refused(f"it holds record {repeated[0]} twice")
    # A compressed record could unpack to any size; torch never compresses.
    packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise Refused(f"record {packed[0]} is compressed; torch stores records as they are")
    pickles = [name for name in names if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise Refused(f"it holds {len(pickles)} data.pkl records, expected one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise Refused("its numbers are not little-endian")
    with archive.open(pickles[0]) as file:
        state = _TensorUnpickler(file).load()
    if not isinstance(state, dict):
        raise Refused(f"it holds a {type(state).__name__}, expected a state dict")
    views = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise Refused(f"entry {name!r:.80} is a {type(tensor).__name__}, expected a flat dict of tensors")
        views[name] = _checked_view(*tensor.view)
    return root, views


def _numbers(path: Path, record: _Record, view: _View) -> LazyTensor:
    dtype = STORAGE_DTYPES[view.storage.dtype_name]
    if record.size < view.storage.numel * dtype.itemsize:
        raise Refused(
            f"storage {view.storage.key} has {record.size} bytes, expected {view.storage.numel} x {dtype.itemsize}"
        )
    place = record.offset + view.offset * dtype.itemsize
    return stored(path, dtype, view.shape, place, view.stride, record.check)


# What a damaged or hostile archive makes zipfile and pickle raise.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError,
    OSError, NotImplementedError, RuntimeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


def open_torch_file(path: str | Path) -> dict[str, LazyTensor]:
    """Tensors of a state dict saved by ``torch.save`` (``*.bin``, ``*.pth``), in its order; numbers are read later.

    Raises ValueError naming the file when it is damaged, not in torch's zip format (torch before 1.6; save it again),
    or when its pickle names anything but tensors. A record whose checksum is wrong raises when it is read.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root, views = _state_dict(archive)
            keys = {view.storage.key for view in views.values()}
            records = {key: _Record(path, archive.getinfo(f"{root}data/{key}")) for key in keys}
        return {name: _numbers(path, records[view.storage.key], view) for name, view in views.items()}
    except ARCHIVE_ERRORS as error:
        raise damaged(path, error) from error
