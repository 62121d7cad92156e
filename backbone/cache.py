"""The key-value cache: allocated once, written in place, rows kept or dropped after each pass."""

from __future__ import annotations

import numpy as np

from ops.decoder_layer import keep_rows
from runtime import jt

LANES = 16


class CacheFull(ValueError):
    """More rows were to be written than the cache has left."""


class KVCache:
    """Keys and values of every layer for one sequence of up to ``max_length`` rows.

    ``length`` counts the rows that belong to the sequence. A pass writes its rows behind them; ``commit`` then says
    which of those stay. ``data``: (layers, 2, kv_heads, max_length, head_dim rounded up to 16).
    """

    def __init__(self, config, max_length: int, dtype: str):
        if max_length < 1:
            raise ValueError(f"a cache needs room for at least one row, got {max_length}")
        padded = -(-config.head_dim // LANES) * LANES
        self.max_length, self.length, self.pending = max_length, 0, 0
        self.writer = None  # the last pass, which Jittor would not run at all if nobody read its result
        self.data = jt.zeros((config.num_layers, 2, config.num_kv_heads, max_length, padded), dtype=dtype)
        self.data.stop_grad()
        self.data.sync()

    @property
    def room(self) -> int:
        """Rows that can still be written."""
        return self.max_length - self.length

    def reserve(self, num_rows: int) -> None:
        """Note that a pass writes ``num_rows`` rows now. Raises CacheFull when they do not fit."""
        if num_rows > self.room:
            raise CacheFull(
                f"the cache holds {self.length} of {self.max_length} rows, {num_rows} more do not fit; "
                "use a larger cache, a smaller tree or a shorter prompt"
            )
        self.pending = num_rows

    def written_by(self, last) -> None:
        """Hold the Var whose computation writes the reserved rows, until they are committed or overwritten."""
        self.writer = last

    def commit(self, path) -> None:
        """Keep the rows of the last pass named by ``path`` (ascending indices into the pass), drop the others.

        Worked example: length 5, a pass wrote rows 0..3 to slots 5..8; commit([0, 2]) moves slot 7 to slot 6 and
        leaves length 7. Raises ValueError for rows that the last pass did not write.
        """
        path = np.asarray(path, np.int32).reshape(-1)
        if len(path) and (path[0] < 0 or path[-1] >= self.pending or (np.diff(path) <= 0).any()):
            raise ValueError(f"cannot commit rows {path.tolist()} of a pass of {self.pending} rows")
        if self.writer is not None:
            self.writer.sync()
            self.writer = None
        if (path != np.arange(len(path))).any():
            keep_rows(self.data, path, self.length)
        self.length += len(path)
        self.pending = 0

    def rewind(self, length: int) -> None:
        """Forget everything behind the first ``length`` rows."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} rows to {length}")
        self.length, self.pending, self.writer = length, 0, None
