"""The files of a head: which one a folder holds, opening it, and writing a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backbone.files.layout import PICKLE_FILE, container
from backbone.files.lazy import LazyTensor, damaged, in_memory
from backbone.files.pickle_file import open_pickle_file
from backbone.formats.containers import write_safetensors, write_torch
from backbone.weights import open_file
from heads.checkpoint import CONFIG, PROVENANCE, WEIGHTS
from runtime.atomic import atomic_directory
from runtime.files.documents import read_object, write_json

CALIBRATION = "calibration.json"  # bench/calibrate.py puts it into a checkpoint; it names its weights
MEDUSA_PT, MEDUSA_SAFETENSORS = "medusa_lm_head.pt", "medusa_lm_head.safetensors"
HYDRA_PT, TENSORRT = "hydra_lm_head.pt", "rank0.safetensors"
MODEL_SAFETENSORS, MODEL_BIN = "model.safetensors", "pytorch_model.bin"
# The weight files of a folder, by precedence.
FILES = (WEIGHTS, MEDUSA_SAFETENSORS, MEDUSA_PT, HYDRA_PT, TENSORRT, MODEL_SAFETENSORS, MODEL_BIN)
# The only files that a conversion may replace in a folder.
REPLACEABLE = {*FILES, CONFIG, PROVENANCE, CALIBRATION}


@dataclass
class Found:
    """An opened file. file: the one with the tensors; config: the config.json beside it, {} where there is none; texts:
    text entries of the file itself, by name; notes: about files that were not read."""

    file: Path
    tensors: dict[str, LazyTensor]
    config: dict
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_head(path: Path) -> Found | None:
    """The file at a path, or the weight file of a folder; None where there is none.

    Only headers are read, except for ``.npz``. Raises ValueError naming a damaged or hostile file.
    """
    path, notes = Path(path), []
    file = path
    if path.is_dir():
        # The folder of a run has a folder for its checkpoint.
        folder = path / "checkpoint" if (path / "checkpoint" / WEIGHTS).is_file() else path
        present = [folder / name for name in FILES if (folder / name).is_file()]
        if not present:
            return None
        file = present[0]
        if {MEDUSA_PT, MEDUSA_SAFETENSORS} <= {other.name for other in present}:
            notes.append(f"{MEDUSA_PT} beside {MEDUSA_SAFETENSORS} was not read")
    elif not path.is_file():
        return None
    beside = file.with_name(CONFIG)
    config = read_object(beside) if beside.is_file() else {}
    if is_npz(file):
        arrays, texts = _read_npz(file)
        return Found(file, arrays, {}, texts, notes)
    if container(file) == PICKLE_FILE:
        tensors, entries = open_pickle_file(file)
        return Found(file, tensors, {}, {k: v for k, v in entries.items() if isinstance(v, str)}, notes)
    return Found(file, open_file(file), config, {}, notes)


def is_npz(path: Path) -> bool:
    """Whether a file is a zip of nothing but NumPy arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    tensors, texts = {}, {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind == "U" and array.ndim == 0:
                    texts[name] = str(array)
                else:
                    tensors[name] = in_memory(array)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    return tensors, texts


def folder_and_file(out: Path, names: tuple[str, ...]) -> tuple[Path, str]:
    """The folder and the name of its weight file. out: the folder, or a file in it with one of the names.

    Raises ValueError for the name of another file.
    """
    out = Path(out)
    if out.name in names:
        return out.parent, out.name
    if out.suffix in (".pt", ".bin", ".pth", ".safetensors", ".npz", ".pkl", ".jtr"):
        raise ValueError(f"--out {out} names a file; expected a folder, or {' or '.join(names)} in one")
    return out, names[0]


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ValueError when a folder must not be replaced: always when it holds more than a head."""
    if not folder.exists():
        return
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = sorted(names - REPLACEABLE)
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which is not part of a head; choose another --out")
    if names and not overwrite:
        raise ValueError(f"{folder} exists; pass --overwrite to replace it, or choose another --out")


def check_file(path: Path, overwrite: bool) -> None:
    """Raises ValueError when a file must not be replaced."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; expected a file name")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; pass --overwrite to replace it, or choose another --out")


def write_folder(folder: Path, file: str, tensors: Mapping[str, LazyTensor], config: dict) -> None:
    """A folder with config.json and a weight file, in the container of its suffix."""
    write = write_safetensors if file.endswith(".safetensors") else write_torch
    with atomic_directory(folder) as partial:
        write(partial / file, tensors)
        write_json(partial / CONFIG, config)
