"""Which keys each row of a pass sees: a chain, a tree, packed sequences, or many conversations in one cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime import jt
from runtime.types import Var

# On CUDA: rows that go through a layer together, and queries that an mma takes.
STRETCH, TILE_QUERIES = 512, 16
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Tiles:
    """How the queries of a pass are distributed over blocks on CUDA. A tile's rows start at the same slot.

    table: (stretches, most tiles of one, 4) int32: the first query, counted within the stretch; the number of queries,
    0 past the end; and, without the base, the number of keys that all rows share and the most keys of a row.
    parts: a tile has up to 16 * parts queries. keys: the most that any row sees, without the base. stretch: rows that
    go through a layer together.
    """

    table: Var
    parts: int
    keys: int
    stretch: int


class RowPlan:
    """Which keys each row of a pass sees, and where it writes its own. Made once per tree, used every pass.

    All offsets count from the cache length at the time of the pass. A row sees ``contiguous`` cache slots (the
    prefix, and its ancestors while they follow it without a gap), then the slots in ``extras``, in this order.

    Worked example, a root with two children, the second of which has one child: parents [-1, 0, 0, 2] give
    positions [0, 1, 1, 2]; ancestors and self [0], [0 1], [0 2], [0 2 3]; contiguous [1, 2, 1, 1] and extras
    [], [], [2], [2 3].
    """

    def __init__(self, parents: np.ndarray, positions: np.ndarray | None = None):
        parents = np.asarray(parents, np.int64)
        rows = len(parents)
        if parents.ndim != 1 or rows == 0 or (parents >= np.arange(rows)).any() or (parents < -1).any():
            raise ValueError(f"attend must name an earlier row or -1 for every row, got {parents.tolist()}")
        depths, contiguous = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        extras: list[list[int]] = []
        for row, parent in enumerate(parents):
            depths[row] = depths[parent] + 1 if parent >= 0 else 0
            before = contiguous[parent] if parent >= 0 else 0
            rest = extras[parent] if parent >= 0 else []
            joins = not rest and before == row
            contiguous[row] = before + 1 if joins else before
            extras.append([] if joins else [*rest, row])
        self._build(depths if positions is None else np.asarray(positions), np.arange(rows), 0, contiguous, extras)

    def _build(self, positions, slots, starts, contiguous, extras) -> None:
        rows = len(positions)
        table = np.full((rows, max(1, max(len(e) for e in extras))), -1, np.int32)
        for row, extra in enumerate(extras):
            table[row, : len(extra)] = extra
        meta = np.stack([positions, slots, np.broadcast_to(starts, (rows,)), contiguous], 1)
        self._hold(meta.astype(np.int32), table)

    def _hold(self, meta: np.ndarray, extras: np.ndarray) -> None:
        """meta: (rows, 4) int32: position, slot, start, contiguous; extras: (rows, width) int32, -1 past the end."""
        self.num_rows, self.positions = len(meta), meta[:, 0]
        self.meta_array, self.extras_array = meta, extras
        self.meta, self.extras = jt.array(meta), jt.array(extras)
        self.max_position = int(self.positions.max())
        self._tiles: dict[int, Tiles] = {}

    @classmethod
    def chain(cls, num_rows: int) -> RowPlan:
        """Consecutive rows, as in a prompt."""
        plan = cls.__new__(cls)
        rows = np.arange(num_rows)
        plan._build(rows, rows, 0, rows + 1, [[]] * num_rows)
        return plan

    @classmethod
    def sequences(cls, lengths) -> RowPlan:
        """Several causal sequences end to end, none of which sees another. lengths: (sequences,)."""
        plan = cls.__new__(cls)
        lengths = np.asarray(lengths, np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = np.arange(lengths.sum())
        plan._build(rows - starts, rows, starts, rows - starts + 1, [[]] * len(rows))
        return plan

    @classmethod
    def lanes(cls, lengths, capacity: int) -> RowPlan:
        """One new row for each of several sequences, each in its own range of ``capacity`` cache slots."""
        starts = np.arange(len(lengths)) * capacity
        return cls.after([cls.single()] * len(starts), starts, lengths)

    @staticmethod
    @functools.cache
    def single() -> RowPlan:
        """One row."""
        return RowPlan.chain(1)

    @classmethod
    def after(cls, plans: Sequence[RowPlan], starts, lengths) -> RowPlan:
        """Several plans in one pass, each after a sequence of its own: that of plan i starts at slot ``starts[i]`` and
        has ``lengths[i]`` rows. For a pass over a cache whose own length is 0.

        Worked example, two chains of 2 rows after 3 rows from slot 0 and 5 rows from slot 20: positions [3 4 5 6],
        slots [3 4 25 26], starts [0 0 20 20], contiguous [4 5 6 7].
        """
        plan, lengths = cls.__new__(cls), np.asarray(lengths, np.int32)
        first_slots = np.asarray(starts, np.int32)
        counts = np.array([each.num_rows for each in plans])
        length, start = np.repeat(lengths, counts), np.repeat(first_slots, counts)
        meta = np.concatenate([each.meta_array for each in plans])
        meta = meta + np.stack([length, start + length, start, length], 1)
        width = max(each.extras_array.shape[1] for each in plans)
        extras = np.full((len(meta), width), -1, np.int32)
        for row, each in zip(np.cumsum(counts) - counts, plans, strict=True):
            extras[row : row + each.num_rows, : each.extras_array.shape[1]] = each.extras_array
        extras = np.where(extras < 0, -1, extras + (start + length)[:, None])
        plan._hold(meta.astype(np.int32), extras.astype(np.int32))
        return plan

    def tiles(self, group: int) -> Tiles:
        """The queries of a key-value head that ``group`` query heads share, row by row, in tiles.

        Worked example, tiles of 16 queries, group 4: the tree of the class's example has one tile, [0, 16, 1, 3]: rows
        2 and 3 have extras after 1 shared key, row 3 sees 3 keys. Two chains of 2 rows after prefixes of 3 and 5 have
        the tiles [0, 8, none, 5] and [8, 8, none, 7].
        """
        if group not in self._tiles:
            starts, contiguous = self.meta_array[:, 2], self.meta_array[:, 3]
            more = (self.extras_array >= 0).sum(1)
            keys, shared = contiguous + more, np.where(more > 0, contiguous, NO_LIMIT)
            rows = np.arange(self.num_rows)
            begins = np.flatnonzero((rows % STRETCH == 0) | np.append(True, starts[1:] != starts[:-1]))
            ends = np.append(begins[1:], self.num_rows)
            longest = int((ends - begins).max()) * group
            parts = min(4, 1 << max(0, (-(-longest // TILE_QUERIES) - 1).bit_length()))
            stretches: list[list] = [[] for _ in range(-(-self.num_rows // STRETCH))]
            for begin, end in zip(begins * group, ends * group, strict=True):
                for first in range(begin, end, TILE_QUERIES * parts):
                    last = min(end, first + TILE_QUERIES * parts)
                    seen, stretch = slice(first // group, (last - 1) // group + 1), first // group // STRETCH
                    tile = (first - stretch * STRETCH * group, last - first, shared[seen].min(), keys[seen].max())
                    stretches[stretch].append(tile)
            table = np.zeros((len(stretches), max(map(len, stretches)), 4), np.int32)
            for place, tiles in enumerate(stretches):
                table[place, : len(tiles)] = tiles
            self._tiles[group] = Tiles(jt.array(table), parts, int(keys.max()), STRETCH)
        return self._tiles[group]

    def mask(self, base: int, num_slots: int) -> np.ndarray:
        """The same as a boolean matrix (rows, num_slots): True where the row may look."""
        seen = np.zeros((self.num_rows, num_slots), bool)
        for row, (_, _, start, contiguous) in enumerate(self.meta_array):
            seen[row, start : start + contiguous + base] = True
            extra = self.extras_array[row]
            seen[row, base + extra[extra >= 0]] = True
        return seen
