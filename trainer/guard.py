"""The end of a run whose updates are no longer finite: its last step is saved, and the likely reason named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import runtime
from trainer.data.tokens import TokenizedData
from trainer.loss import Batch


def save_bad_step(out: Path, step: int, batches: list[Batch], data: TokenizedData, indices: Sequence[int]) -> str:
    """Save a step's sequences and this rank's features for ``numpy.load``. Returns what is wrong: the features that are
    not finite, or that all are, and the path."""
    rank = f"-rank{runtime.rank()}" if runtime.world_size() > 1 else ""
    path, part = out / f"bad-step-{step}{rank}.npz", data.select(indices)
    arrays = {"sequences": indices, "token_ids": part.token_ids, "mask": part.mask, "offsets": part.offsets}
    for number, batch in enumerate(batches):
        arrays[f"hidden{number}"], arrays[f"labels{number}"] = batch.features.hidden.numpy()[0], batch.labels
        arrays[f"positions{number}"] = batch.positions
    np.savez(path, **arrays)
    return f"{bad_features(batches) or 'the features are finite: lower --learning-rate'}; see {path}"


def bad_features(batches: list[Batch]) -> str:
    """Which rows of the features are not finite; empty when all are."""
    for batch in batches:
        named = {"the last hidden state": batch.features.hidden}
        named |= {f"layer {i}": layer for i, layer in batch.features.layers.items()}
        for name, var in named.items():
            bad = np.flatnonzero(~np.isfinite(var.numpy()[0]).all(1))
            if len(bad):
                return f"{name} is not finite at {len(bad)} of {var.shape[1]} tokens, first at {bad[0]}"
    return ""
