"""Streams tensors into files: safetensors, torch's zip, and a pickle that jittor.load reads.

Each file starts with what is known before any number is read (names, types, shapes, places), then the numbers follow.
The content does not depend on the time, the machine or the size of the blocks.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from backbone.files.lazy import LazyTensor, contiguous_stride
from backbone.files.pickle_file import DTYPES as PICKLE_DTYPES
from backbone.files.pickle_file import MAGIC
from backbone.files.torch_file import LOCAL_HEADER, STORAGE_DTYPES
from backbone.weights import SAFETENSORS_DTYPES
from runtime.files.documents import to_json

Tensors = Mapping[str, LazyTensor]
ALIGNMENT = 64  # bytes, of records in torch's archives: their numbers can then be used where they are mapped
PADDING_FIELD = 0x4246  # "FB", the extra field by which torch aligns records
ZIP64_FIELD_BYTES = 20  # the extra field that zipfile adds to the local header of a long record


def _stream(tensor: LazyTensor, write: Callable[[Any], Any]) -> None:
    for block in tensor.blocks():
        write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _names_of(table: Mapping[str, np.dtype]) -> dict[np.dtype, str]:
    return {dtype: name for name, dtype in table.items()}


def _type_names(tensors: Tensors, known: Mapping[np.dtype, str], container: str) -> dict[str, str]:
    """The container's name for the type of each tensor. ValueError naming the tensor for a type that it cannot hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            raise ValueError(f"{name} is {tensor.dtype}, which {container} cannot hold; choose another --dtype")
    return {name: known[tensor.dtype] for name, tensor in tensors.items()}


# safetensors ---------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """One ``*.safetensors`` file. Wide types come first, so that each tensor is aligned to its type's size."""
    names = _type_names(tensors, _names_of(SAFETENSORS_DTYPES), "safetensors")
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": names[name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = to_json(header, compact=True).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _stream(tensors[name], file.write)


# Pickles, operation by operation --------------------------------------------------------------------------------------


def _pickled(value: Any) -> bytes:
    """Operations that put a plain value on the stack. Protocol 3: it numbers what it remembers inside the fragment
    alone, so that fragments can follow each other."""
    return pickle.dumps(value, protocol=3)[2:-1]  # without the protocol's two bytes and the final stop


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


# torch's zip ---------------------------------------------------------------------------------------------------------


def _torch_pickle(tensors: Tensors, keys: Mapping[str, str], names: Mapping[str, str]) -> bytes:
    """data.pkl: an ordered dict of tensors, each a storage of its own. Only what torch.load(weights_only=True)
    allows."""
    empty = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\x02", empty, pickle.MARK]
    for name, tensor in tensors.items():
        numel = tensor.nbytes // tensor.dtype.itemsize
        storage = (
            pickle.MARK, _pickled("storage"), _global("torch", names[name]), _pickled(keys[name]), _pickled("cpu"),
            _pickled(numel), pickle.TUPLE, pickle.BINPERSID,
        )  # fmt: skip
        rebuild = (
            _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *storage, _pickled(0), _pickled(tensor.shape),
            _pickled(contiguous_stride(tensor.shape)), pickle.NEWFALSE, empty, pickle.TUPLE, pickle.REDUCE,
        )  # fmt: skip
        parts += [_pickled(name), *rebuild]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _aligned(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """A record whose data starts at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    long = size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides
    begin = archive.fp.tell() + LOCAL_HEADER.size + len(name) + (ZIP64_FIELD_BYTES if long else 0) + 4
    padding = -begin % ALIGNMENT
    info.extra = struct.pack("<HH", PADDING_FIELD, padding) + b"Z" * padding
    return info


def write_torch(path: Path, tensors: Tensors, shared: Mapping[str, str] | None = None) -> None:
    """What ``torch.save`` writes for a dict of tensors. shared: name -> the other name whose numbers it has too."""
    names = _type_names(tensors, _names_of(STORAGE_DTYPES), "torch's zip format")
    keys = {name: str(index) for index, name in enumerate(tensors)}
    keys |= {name: keys[other] for name, other in (shared or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", _torch_pickle(tensors, keys, names)), ("byteorder", b"little")):
            archive.writestr(_aligned(archive, f"archive/{name}", len(data)), data)
        for name, tensor in tensors.items():
            if name not in (shared or {}):
                info = _aligned(archive, f"archive/data/{keys[name]}", tensor.nbytes)
                with archive.open(info, "w") as record:
                    _stream(tensor, record.write)
        archive.writestr(_aligned(archive, "archive/version", 2), b"3\n")


# jittor's pickle -----------------------------------------------------------------------------------------------------


class _Hashed:
    """A file that keeps the sha1 of what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self.sha1 = file, hashlib.sha1()

    def write(self, data: Any) -> None:
        self.sha1.update(data)
        self._file.write(data)


def write_pickle(path: Path, tensors: Tensors, entries: Mapping[str, Any]) -> None:
    """A pickled dict with ``entries`` (plain values) and then the tensors as NumPy arrays, which ``jittor.load`` and
    ``pickle.load`` read. It ends with the checksum that ``jittor.save`` writes."""
    known = {np.dtype(code): code for code in PICKLE_DTYPES}
    if any(tensor.dtype == np.dtype(ml_dtypes.bfloat16) for tensor in tensors.values()):
        raise ValueError("NumPy, and so a .pkl, has no bfloat16; choose --dtype float32, which holds the same numbers")
    codes = _type_names(tensors, known, "a .pkl")
    array = _global("numpy.core.multiarray", "_reconstruct") + pickle.MARK + _global("numpy", "ndarray")
    array += _pickled((0,)) + _pickled(b"b") + pickle.TUPLE + pickle.REDUCE
    with open(path, "wb") as file:
        target = _Hashed(file)
        target.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK)
        for name, value in entries.items():
            target.write(_pickled(name) + _pickled(value))
        for name, tensor in tensors.items():
            # The state of an array: version, shape, type, not Fortran's order, numbers.
            target.write(_pickled(name) + array + pickle.MARK + _pickled(1) + _pickled(tensor.shape))
            target.write(_pickled(np.dtype(codes[name])) + pickle.NEWFALSE)
            target.write(pickle.BINBYTES8 + struct.pack("<Q", tensor.nbytes))
            _stream(tensor, target.write)
            target.write(pickle.TUPLE + pickle.BUILD)
        target.write(pickle.SETITEMS + pickle.STOP)
        file.write(target.sha1.digest() + MAGIC)
