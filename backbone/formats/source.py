"""A backbone on disk in any format: config, tensors by name, and the files that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbone.config import BackboneConfig, RawConfig, read_raw_config
from backbone.files.layout import META, META_SHARD, PICKLE, PICKLE_FILE, PICKLE_NAME, container, layouts
from backbone.files.lazy import LazyTensor
from backbone.files.meta import EMBEDDING as META_EMBEDDING
from backbone.files.pickle_file import open_pickle_file
from backbone.weights import (
    EMBEDDING,
    LM_HEAD,
    ROTARY_BUFFER,
    check_names,
    expected_shapes,
    open_file,
    open_tensors,
    weight_files,
)

# Files copied besides config.json and generation_config.json: the tokenizer and the chat template.
COPIED = re.compile(
    r"^(tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template.*)$"
)
FILES_ENTRY = "files"  # of a .pkl: the copied files, name -> bytes


@dataclass(frozen=True)
class Source:
    """``tensors``: exactly those that ``config`` calls for, by Hugging Face name, not yet read. ``files``: name -> path
    or contents. ``notes``: values that were assumed, and tensors that were left out because they follow from others."""

    path: Path
    layout: str
    raw: RawConfig
    config: BackboneConfig
    tensors: dict[str, LazyTensor]
    files: dict[str, Path | bytes]
    notes: tuple[str, ...]


def _names(path: Path, layout: str) -> set[str]:
    """Names of the tensors as the files spell them; an index is taken at its word."""
    if layout == META:
        shards = sorted(entry for entry in path.iterdir() if META_SHARD.match(entry.name))
        return set(open_file(shards[0]))
    if layout == PICKLE:
        return set(open_file(path / PICKLE_NAME if path.is_dir() else path))
    names: set[str] = set()
    for file, listed in weight_files(path, layout).items():
        names |= set(open_file(file)) if listed is None else listed
    return names


def _is_loose_shard(path: Path) -> bool:
    """Whether a file holds a part of a backbone."""
    try:
        names = open_file(path)
    except ValueError:
        return False  # a head's file, perhaps in a container of its own: heads.formats decides
    return EMBEDDING in names or META_EMBEDDING in names


def recognize(path: str | Path) -> str | None:
    """The format of the backbone at a path, from the tensors in its files; None when it holds no backbone.

    Raises ValueError when there is nothing at the path, and for files of a folder that are damaged or hostile.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a backbone or a head")
    if path.is_file() and container(path) != PICKLE_FILE:
        if _is_loose_shard(path):
            raise ValueError(f"{path} is one file of a backbone; pass its folder")
        return None
    for layout in layouts(path):
        if (META_EMBEDDING if layout == META else EMBEDDING) in _names(path, layout):
            return layout
    return None


def _copied_files(path: Path) -> dict[str, Path | bytes]:
    if path.is_dir():
        return {entry.name: entry for entry in sorted(path.iterdir()) if COPIED.match(entry.name) and entry.is_file()}
    files = open_pickle_file(path)[1].get(FILES_ENTRY, {})
    if not isinstance(files, dict) or not all(isinstance(data, bytes) for data in files.values()):
        raise ValueError(f"{path}: entry {FILES_ENTRY!r} is not a dict of file names and their bytes")
    if strange := [name for name in files if not isinstance(name, str) or not COPIED.match(name) or "/" in name]:
        raise ValueError(f"{path}: entry {FILES_ENTRY!r} has {strange[0]!r:.80}, which is no tokenizer's file")
    return dict(files)


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pairs = zip(first.blocks(), second.blocks(), strict=True)
    return all(np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)) for one, other in pairs)


def _without_copies(tensors: dict[str, LazyTensor], config: BackboneConfig, notes: list[str]) -> dict[str, LazyTensor]:
    """The tensors without rotary buffers, and without a language-model head that repeats the embedding."""
    found = {name: tensor for name, tensor in tensors.items() if not ROTARY_BUFFER.search(name)}
    if len(found) < len(tensors):
        notes.append(f"{len(tensors) - len(found)} rotary buffers are left out: they follow from the config")
    if config.tie_embeddings and EMBEDDING in found and LM_HEAD in found:
        if not _equal(found[EMBEDDING], found[LM_HEAD]):
            raise ValueError(
                f"{LM_HEAD} differs from {EMBEDDING} though the config ties them; "
                "set tie_word_embeddings to false in config.json"
            )
        del found[LM_HEAD]
        notes.append(f"{LM_HEAD} is left out: the config ties it to the embedding, which it equals")
    return found


def open_source(path: str | Path, layout: str | None = None) -> Source:
    """A backbone, its names and shapes checked and its numbers unread. layout: its format; None: as recognized.

    Raises ValueError naming the file, field or tensor when it holds none, or not what its config calls for.
    """
    path = Path(path)
    layout = layout or recognize(path)
    if layout is None:
        raise ValueError(f"{path} has no backbone; expected one of the formats that --list prints")
    raw = read_raw_config(path, meta=layout == META)
    notes = [*raw.notes, *raw.assumed]
    try:
        config = raw.parse()
        expected = expected_shapes(config)
        tensors = _without_copies(dict(open_tensors(path, layout)), config, notes)
        check_names({name: tensor.shape for name, tensor in tensors.items()}, expected)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    ordered = {name: tensors[name] for name in expected}
    return Source(path, layout, raw, config, ordered, _copied_files(path), tuple(notes))
