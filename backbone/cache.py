"""The key-value cache: allocated once, written in place, rows kept or dropped after each pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ops.cache_rows import keep_rows
from ops.row_plan import RowPlan
from runtime import jt

LANES = 16


class CacheFull(ValueError):
    """The rows of a pass do not fit into the cache."""


class KVCache:
    """Keys and values of every layer for one sequence of up to ``max_length`` rows.

    ``length`` counts the rows that belong to the sequence. A pass writes its rows after them; ``commit`` then selects
    the rows that stay. ``data``: (layers, 2, kv_heads, max_length, head_dim rounded up to 16).
    """

    def __init__(self, config, max_length: int, dtype: str):
        self._begin(max_length)
        padded = -(-config.head_dim // LANES) * LANES
        self.data = jt.zeros((config.num_layers, 2, config.num_kv_heads, max_length, padded), dtype=dtype)
        self.data.stop_grad()
        self.data.sync()

    def _begin(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"a cache needs room for at least one row, got {max_length}")
        self.max_length, self.length, self.pending = max_length, 0, 0
        self.writer = None  # the last pass: Jittor does not run a pass whose result nobody reads

    @property
    def room(self) -> int:
        """Rows that can still be written."""
        return self.max_length - self.length

    def reserve(self, num_rows: int) -> None:
        """Reserve room for the ``num_rows`` rows of a pass. Raises CacheFull when they do not fit."""
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
        path = np.asarray(path, np.int32).reshape(-1).tolist()  # a few numbers: plain Python is faster
        ascending = all(after > before for before, after in pairwise(path))
        if not ascending or (path and (path[0] < 0 or path[-1] >= self.pending)):
            raise ValueError(f"cannot commit rows {path} of a pass of {self.pending} rows")
        if self.writer is not None:
            self.writer.sync()
            self.writer = None
        if path and path[-1] != len(path) - 1:  # ascending: else the rows are in place already
            self.move(self.length + np.array(path, np.int32), self.length + np.arange(len(path), dtype=np.int32))
        self.length += len(path)
        self.pending = 0

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Move rows between slots, (moved,) int32 each, in this order: no slot may be a target before it has been a
        source."""
        keep_rows(self.data, sources, targets)

    def rewind(self, length: int) -> None:
        """Drop everything after the first ``length`` rows."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} rows to {length}")
        self.length, self.pending, self.writer = length, 0, None


class BatchCache:
    """Keys and values of several sequences, each in a lane of its own of ``max_length`` rows.

    ``lengths[lane]`` counts the rows of a lane. A pass over some lanes takes ``plan`` and ``slots``, the cache that all
    lanes share; ``commit`` then selects for each of these lanes the rows that stay.
    """

    def __init__(self, config, num_lanes: int, max_length: int, dtype: str):
        if num_lanes < 1:
            raise ValueError(f"a batch has at least one lane, got {num_lanes}")
        self.slots = KVCache(config, num_lanes * max_length, dtype)
        self.max_length, self.lengths = max_length, np.zeros(num_lanes, np.int64)
        self.pending: list[tuple[int, int]] = []  # (lane, rows) of the last pass

    def clear(self) -> None:
        """Empty every lane."""
        self.lengths[:], self.pending = 0, []
        self.slots.rewind(0)

    def room(self, lane: int) -> int:
        """Rows that can still be written to a lane."""
        return int(self.max_length - self.lengths[lane])

    def plan(self, lanes: Sequence[int], plans: Sequence[RowPlan]) -> RowPlan:
        """One pass over these lanes, whose new rows follow the rows they hold. Raises CacheFull."""
        for lane, each in zip(lanes, plans, strict=True):
            if each.num_rows > self.room(lane):
                raise CacheFull(
                    f"lane {lane} holds {self.lengths[lane]} of {self.max_length} rows, {each.num_rows} more do not fit"
                )
        self.pending = [(lane, each.num_rows) for lane, each in zip(lanes, plans, strict=True)]
        lanes = np.asarray(lanes)
        return RowPlan.after(plans, lanes * self.max_length, self.lengths[lanes])

    def commit(self, paths: Sequence[np.ndarray]) -> None:
        """Keep, of each lane of the last pass, the rows named by its path (ascending indices into the lane's rows).

        Raises ValueError for rows that the last pass did not write.
        """
        sources, targets = [], []
        for (lane, rows), path in zip(self.pending, paths, strict=True):
            path = np.asarray(path, np.int64)
            if len(path) and (path[0] < 0 or path[-1] >= rows or (np.diff(path) <= 0).any()):
                raise ValueError(f"cannot commit rows {path.tolist()} of the {rows} rows of lane {lane}")
            end = lane * self.max_length + self.lengths[lane]
            sources.append(end + path)
            targets.append(end + np.arange(len(path)))
            self.lengths[lane] += len(path)
        self.slots.commit([])  # the lanes keep count themselves
        self.pending = []
        sources, targets = np.concatenate(sources), np.concatenate(targets)
        moved = sources != targets
        if moved.any():
            self.slots.move(sources[moved].astype(np.int32), targets[moved].astype(np.int32))
