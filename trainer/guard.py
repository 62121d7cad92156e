"""Updates that are not finite are skipped and counted; too many in a row end the run, and the last step's data are
saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import runtime
from trainer.data.tokens import TokenizedData
from trainer.loss import Batch


class Guard:
    """Counts consecutive skipped updates. limit: the most that are tolerated."""

    def __init__(self, out: Path, limit: int):
        self.out, self.limit, self.in_row = Path(out), limit, 0

    def passed(self) -> None:
        """Note an update that was made."""
        self.in_row = 0

    def skipped(
        self, error: FloatingPointError, step: int, batches: list[Batch], data: TokenizedData, indices: Sequence[int]
    ) -> None:
        """Count a skipped update. Raises FloatingPointError when there are too many, naming the file with the step's
        text and features and, if that is the reason, the features that are not finite."""
        self.in_row += 1
        if self.in_row <= self.limit:
            return
        path = self.save(step, batches, data, indices)
        reason = bad_features(batches) or "the features are finite: lower --learning-rate"
        raise FloatingPointError(f"{error}, step {step}, the {self.in_row}th update in a row; {reason}; see {path}")

    def save(self, step: int, batches: list[Batch], data: TokenizedData, indices: Sequence[int]) -> Path:
        """Write the step's sequences and this rank's features, for ``numpy.load``; returns the path."""
        rank = f"-rank{runtime.rank()}" if runtime.world_size() > 1 else ""
        path = self.out / f"bad-step-{step}{rank}.npz"
        part = data.select(indices)
        arrays = {"sequences": np.asarray(indices), "token_ids": part.token_ids, "mask": part.mask}
        arrays["offsets"] = part.offsets
        for number, batch in enumerate(batches):
            arrays[f"hidden{number}"], arrays[f"labels{number}"] = batch.features.hidden.numpy()[0], batch.labels
            arrays[f"positions{number}"] = batch.positions
        np.savez(path, **arrays)
        return path


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
