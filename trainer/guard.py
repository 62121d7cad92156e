"""What happens when an update is not finite: it is left out and counted; several in a row end the run, and what they
were made of is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import runtime
from trainer.data.tokens import TokenizedData
from trainer.loss import Batch


class Guard:
    """Counts the updates in a row that were left out. limit: so many may be."""

    def __init__(self, out: Path, limit: int):
        self.out, self.limit, self.in_row = Path(out), limit, 0

    def passed(self) -> None:
        """An update was made."""
        self.in_row = 0

    def skipped(
        self, error: FloatingPointError, step: int, batches: list[Batch], data: TokenizedData, indices: Sequence[int]
    ) -> None:
        """An update was left out. Raises FloatingPointError when one too many was: with the file that the step's text
        and features were written to, and the sequences whose features are not finite, if that is the reason."""
        self.in_row += 1
        if self.in_row <= self.limit:
            return
        path = self.save(step, batches, data, indices)
        reason = bad_features(batches) or "the features are finite: lower --learning-rate"
        raise FloatingPointError(f"{error}, step {step}, the {self.in_row}th update in a row; {reason}; see {path}")

    def save(self, step: int, batches: list[Batch], data: TokenizedData, indices: Sequence[int]) -> Path:
        """The step's sequences and this rank's features, readable by ``numpy.load``."""
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
