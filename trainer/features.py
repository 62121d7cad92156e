"""The backbone's features of the training text: computed at every step, or read from a cache written once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from heads.base import Features
from ops.decoder_layer import RowPlan
from runtime import jt
from runtime.interrupt import check_interrupt, deferred_interrupts
from trainer.data import TokenizedData

CHUNK_TOKENS = 8192  # of a pass while the cache is written: 8 MB of activations a layer at 256 wide


def backbone_features(backbone, data: TokenizedData, indices: Sequence[int], layers: tuple[int, ...]) -> Features:
    """Features of some conversations laid end to end: hidden (1, tokens, dim) and the layers asked for."""
    lengths = data.lengths[list(indices)]
    tokens = np.concatenate([data.conversation(i)[0] for i in indices])
    output = backbone.forward(tokens[None], attend=RowPlan.sequences(lengths), layers=layers, logits=None)
    return Features(output.hidden, output.layers, tuple(int(n) for n in lengths))


class OnlineFeatures:
    """Runs the backbone at every step: nothing on disk."""

    def __init__(self, backbone, data: TokenizedData, layers: tuple[int, ...]):
        self.backbone, self.data, self.layers = backbone, data, layers

    def __call__(self, indices: Sequence[int]) -> Features:
        features = backbone_features(self.backbone, self.data, indices, self.layers)
        features.hidden.sync()
        return features


class CachedFeatures:
    """Reads features from memory-mapped files, one for the last hidden state and one for each layer, (tokens, dim)
    float16 each, in the order of the data."""

    def __init__(self, directory: Path, data: TokenizedData, dim: int, layers: tuple[int, ...]):
        self.data, self.layers = data, layers
        shape = (int(data.offsets[-1]), dim)
        self.maps = [np.memmap(directory / name, np.float16, "r", shape=shape) for name in file_names(layers)]

    def __call__(self, indices: Sequence[int]) -> Features:
        ranges = [(int(self.data.offsets[i]), int(self.data.offsets[i + 1])) for i in indices]
        hidden, *layers = (
            jt.array(np.concatenate([m[a:b] for a, b in ranges]).astype(np.float32)[None]) for m in self.maps
        )
        lengths = tuple(b - a for a, b in ranges)
        return Features(hidden, dict(zip(self.layers, layers, strict=True)), lengths)


def file_names(layers: Sequence[int]) -> list[str]:
    """The files of a feature cache: that of the last hidden state, then one for each layer."""
    return ["hidden.f16", *(f"layer{i}.f16" for i in layers)]


def cache_key(backbone, tokenizer_fingerprint: str, data: TokenizedData) -> str:
    """Names a cache by all it depends on: backbone, how its weights are kept, tokenizer and template, the tokens."""
    digest = hashlib.sha256()
    digest.update(json.dumps([backbone.fingerprint, backbone.storage, tokenizer_fingerprint]).encode())
    digest.update(data.token_ids.tobytes())
    digest.update(data.offsets.tobytes())
    return digest.hexdigest()[:24]


def open_cache(
    backbone,
    tokenizer_fingerprint: str,
    data: TokenizedData,
    layers: tuple[int, ...],
    root: Path,
    on_start: Callable[[Path, int], None] = lambda path, size: None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> CachedFeatures:
    """The feature cache of this data; what it lacks of the wanted layers is written now.

    Heads share it: each adds the layers that none before it asked for. on_start(path, bytes) is called before anything
    is written, on_tokens(count) as it goes. A file is written beside its place and renamed when whole: an interrupted
    write leaves none. Raises ValueError when the disk lacks the room.
    """
    dim, total = backbone.config.hidden_size, int(data.offsets[-1])
    directory = Path(root) / cache_key(backbone, tokenizer_fingerprint, data)
    missing = [name for name in file_names(layers) if not (directory / name).exists()]
    if not missing:
        cached = CachedFeatures(directory, data, dim, layers)
        on_tokens(total)
        return cached
    size = total * dim * 2 * len(missing)
    on_start(directory, size)
    Path(root).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < size * 1.05:
        raise ValueError(
            f"the feature cache takes {size / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free; "
            "use --features online or another --cache-dir"
        )
    partial = directory / f".{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        with deferred_interrupts():
            _write(backbone, data, layers, missing, partial, on_tokens)
        for name in missing:
            os.rename(partial / name, directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_if_empty(directory)
    return CachedFeatures(directory, data, dim, layers)


def _remove_if_empty(directory: Path) -> None:
    if not any(directory.iterdir()):
        directory.rmdir()


def _write(backbone, data: TokenizedData, layers, wanted: Sequence[str], directory: Path, on_tokens) -> None:
    names = file_names(layers)
    files = {name: open(directory / name, "wb") for name in wanted}  # noqa: SIM115 - closed below
    try:
        first = 0
        while first < len(data):
            last = first + 1
            while last < len(data) and data.offsets[last + 1] - data.offsets[first] <= CHUNK_TOKENS:
                last += 1
            features = backbone_features(backbone, data, range(first, last), layers)
            parts = [features.hidden, *(features.layers[i] for i in layers)]
            for name, part in zip(names, parts, strict=True):
                if name not in files:
                    continue
                values = part.numpy()[0].astype(np.float16)
                if not np.isfinite(values).all():
                    raise ValueError("a feature is outside float16; use --features online")
                files[name].write(values.tobytes())
            on_tokens(int(data.offsets[last] - data.offsets[first]))
            check_interrupt()
            first = last
    finally:
        for file in files.values():
            file.close()
