"""Converts a backbone from one format to another, tensor by tensor; the target appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbone.files.layout import PICKLE
from backbone.files.lazy import LazyTensor, finite
from backbone.formats.cast import FLOATS, KEEP, Rounding, cast
from backbone.formats.source import Source, open_source, recognize
from backbone.formats.targets import FOLDERS, Job, write_pickle_file
from runtime.atomic import atomic_directory, atomic_file
from runtime.entry import suggest

DEFAULT_SHARD_SIZE = 5_000_000_000  # bytes, as transformers splits
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. ``source_format``: how to read the source, None to recognize it. ``dtype``: float16, bfloat16,
    float32 or keep; None: the format's own default. ``tolerance``: as in ``formats.verify``. ``shard_size``: bytes. For
    heads only: ``backbone`` is the one the head belongs to, None the embedded one; ``merge`` writes a full
    language-model head per depth for a head that has a shared or low-rank one."""

    source_format: str | None = None
    dtype: str | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    overwrite: bool = False
    verify: bool = False
    tolerance: float | None = None
    backbone: str | None = None
    merge: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was done. ``rounding``: the largest difference that a change of type made, 0 without one."""

    source: str
    source_format: str
    out: str
    out_format: str
    tensors: int
    bytes: int
    dtypes: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0
    rounding_in: str | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _check_target(source: Path, out: Path, to: str, overwrite: bool) -> None:
    """Raises ValueError where writing would destroy something the user did not offer."""
    if out.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json") or (out.suffix == ".pkl" and to != PICKLE):
        raise ValueError(f"--out {out} looks like a file; format {to} is a folder: name one")
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise ValueError(f"--out {out} would replace the source {source}; choose another place")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another place or pass --overwrite")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_dir() == (out.suffix == ".pkl") or not (empty or recognize(out)):
        raise ValueError(f"{out} is not what --overwrite would replace, a backbone; remove it or choose another place")


def _check_space(out: Path, needed: int) -> None:
    """Raises ValueError when nothing can be written there, which a full disk is not, and when it would fill up."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{out} cannot be written: {folder} is read-only; choose another --out")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{out} needs {needed / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB left; free some space")


def _wanted_dtype(source: Source, to: str, name: str | None) -> str:
    name = name or ("float16" if to == PICKLE else KEEP)
    if name not in (*FLOATS, KEEP):
        raise suggest("dtype", name, (*FLOATS, KEEP))
    if to == PICKLE and (name == "bfloat16" or (name == KEEP and FLOATS["bfloat16"] in _dtypes(source.tensors))):
        raise ValueError(
            "NumPy, and so a .pkl, has no bfloat16; choose --dtype float16, or float32, which loses nothing"
        )
    return name


def _dtypes(tensors: dict[str, LazyTensor]) -> set[np.dtype]:
    return {tensor.dtype for tensor in tensors.values()}


def _config_for(source: Source, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the new type if there is one."""
    config = dict(source.raw.config)
    if dtype != KEEP:
        # transformers calls it dtype since version 5, torch_dtype before.
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config |= dict.fromkeys(keys, dtype)
    return config


def convert(
    path: str | Path,
    to: str,
    out: str | Path,
    options: ConvertOptions = ConvertOptions(),
    note: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Write the backbone at ``path`` to ``out`` in format ``to``. note: called with a line about progress.

    Everything that can be checked beforehand is checked first. Raises ValueError for sources that are damaged or
    incomplete, for what the format cannot hold, for numbers that are not finite or that the dtype cannot hold and for a
    full disk; then ``out`` is unchanged.
    """
    path, out, started = Path(path), Path(out), time.monotonic()
    if to not in FOLDERS:
        raise suggest("format", to, FOLDERS)
    _check_target(path, out, to, options.overwrite)
    source = open_source(path, options.source_format)
    for line in source.notes:
        note(line)
    dtype, rounding = _wanted_dtype(source, to, options.dtype), Rounding()
    tensors = {name: finite(f"{path}: {name}", tensor) for name, tensor in source.tensors.items()}
    if dtype != KEEP:
        tensors = {name: cast(name, tensor, FLOATS[dtype], rounding) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    _check_space(out, size)
    job = Job(source, tensors, _config_for(source, dtype), options.shard_size, note)
    try:
        if out.suffix == ".pkl":
            with atomic_file(out) as partial:
                write_pickle_file(job, partial)
        else:
            with atomic_directory(out) as folder:
                FOLDERS[to](job, folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(
            f"{out}: {error.strerror} while writing {size / 1e9:.3g} GB; nothing was written: free some space"
        ) from error
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + 1
    return Conversion(
        str(path), source.layout, str(out), to, len(tensors), size, counts, rounding.largest, rounding.name,
        round(time.monotonic() - started, 3),
    )  # fmt: skip
