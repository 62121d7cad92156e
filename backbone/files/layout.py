"""The layouts of a backbone's files, told by their names, and the type of a file, told by its first bytes."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path

from runtime.files.regular import open_regular

SAFETENSORS, BIN, META, PICKLE = "safetensors", "hf-bin", "meta", "jittor-pkl"
# Hugging Face's: the name of a single file, and what shards of it look like.
SINGLE = {SAFETENSORS: "model.safetensors", BIN: "pytorch_model.bin"}
# Other files of trainers with the same suffix.
NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|random_states.*|consolidated.*)\.(bin|safetensors)$")
META_PARAMS = "params.json"
META_SHARD = re.compile(r"^consolidated\.(\d{2})\.pth$")
PICKLE_NAME = "backbone.pkl"
# Of a config: far above any backbone, and so small that what is made of them fits, such as a name per layer.
MOST_LAYERS, MOST_COUNT, MOST_NUMBER = 10_000, 2**31 - 1, 1e18
# Containers of tensors.
SAFETENSORS_FILE, TORCH_FILE, PICKLE_FILE = "safetensors", "torch", "pickle"


def loose_files(directory: Path, layout: str) -> list[Path]:
    """Weight files of one of Hugging Face's layouts, under any name."""
    found = directory.glob(f"*{Path(SINGLE[layout]).suffix}")
    return sorted(path for path in found if not NOT_WEIGHTS.match(path.name))


def layouts(path: str | Path) -> list[str]:
    """The layouts found at a path, the one to read first; empty for a path without weights."""
    path = Path(path)
    if path.is_file():
        return [PICKLE]
    if not path.is_dir():
        return []
    found = []
    for layout, single in SINGLE.items():
        if (path / single).exists() or (path / f"{single}.index.json").exists() or loose_files(path, layout):
            found.append(layout)
    names = [entry.name for entry in path.iterdir()]
    if META_PARAMS in names and any(META_SHARD.match(name) for name in names):
        found.append(META)
    return found + ([PICKLE] if PICKLE_NAME in names else [])


def container(path: str | Path) -> str | None:
    """The type of a file by its first bytes: safetensors, torch.save's zip or a pickle; None for anything else.

    The header length of a safetensors file may start like a pickle, but a pickle never reads as a length that fits.
    Raises OSError when the file cannot be read, ValueError when it is no regular file.
    """
    with open_regular(path) as file:
        start = file.read(9)
        size = file.seek(0, 2)
    if start[:4] == b"PK\x03\x04":
        return TORCH_FILE
    if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8:
        return SAFETENSORS_FILE
    return PICKLE_FILE if start[:1] == pickle.PROTO else None
