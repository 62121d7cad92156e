"""Many conversations in one pass of the backbone: each has a lane, its own stretch of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from corpus.dialogue import DECIDE, Talk, Writer
from runtime.interrupt import check_interrupt

# Jittor is loaded where it is used: a mistyped option is answered at once.
if TYPE_CHECKING:
    from backbone.model import Backbone
    from ops.row_plan import RowPlan

# Sampling looks at this many candidates: enough for top-p 0.95 at temperature 0.8 in nearly every row, and cheap.
NUM_CANDIDATES = 64


def lane_plan(lanes: np.ndarray, fed: np.ndarray, counts: np.ndarray, capacity: int) -> RowPlan:
    """New rows for several sequences in one cache, each in its own stretch of ``capacity`` slots.

    Worked example with capacity 10: lanes [0, 2], fed [3, 0], counts [1, 2] give slots [3, 20, 21], positions
    [3, 0, 1], starts [0, 20, 20] and contiguous [4, 1, 2].
    """
    from ops.row_plan import RowPlan

    rows = np.arange(counts.sum())
    positions = rows - np.repeat(np.cumsum(counts) - counts - fed, counts)
    starts = np.repeat(lanes * capacity, counts)
    plan = RowPlan.__new__(RowPlan)
    plan._build(positions, starts + positions, starts, positions + 1, [[]] * len(rows))
    return plan


def sample(values: np.ndarray, temperatures: np.ndarray, top_p: float, uniforms: np.ndarray) -> np.ndarray:
    """A column for each row: the first where the temperature is 0, else drawn from the smallest set of columns that
    holds ``top_p`` of the probability. values: (rows, columns), descending. Returns (rows,) int64.

    A row's result does not depend on the other rows.
    """
    columns = np.zeros(len(values), np.int64)
    drawn = np.flatnonzero(temperatures > 0)
    if len(drawn):
        scores = values[drawn].astype(np.float64)
        p = np.exp((scores - scores[:, :1]) / temperatures[drawn, None])
        p /= p.sum(1, keepdims=True)
        p = np.where(p.cumsum(1) - p < top_p, p, 0.0)
        edges = p.cumsum(1)
        columns[drawn] = (edges <= uniforms[drawn, None] * edges[:, -1:]).sum(1)
    return columns


class Batch:
    """The lanes: each carries a conversation until it is over, then the next one. ``generated`` counts new tokens."""

    def __init__(self, backbone: Backbone, writer: Writer, num_lanes: int):
        """Raises ValueError for conversations longer than the backbone's positions."""
        from backbone.cache import KVCache

        self.backbone, self.writer, self.num_lanes, self.generated = backbone, writer, num_lanes, 0
        options = writer.options
        if options.max_length > backbone.config.max_positions:
            raise ValueError(
                f"--max-length is {options.max_length}, the backbone has {backbone.config.max_positions} positions"
            )
        self.capacity = options.max_length
        # One stretch of slots per lane: more slots than positions, which is why new_cache does not serve here.
        self.cache = KVCache(backbone.config, num_lanes * self.capacity, backbone.dtype)

    def run(self, talks: Iterator[Talk], first: int = 0) -> Iterator[Talk]:
        """Each conversation once it is over, in the order of their indices, which count up from ``first``.

        Ctrl-C takes effect between two passes.
        """
        free = list(range(self.num_lanes))[::-1]
        active: dict[int, Talk] = {}
        finished: dict[int, Talk] = {}
        awaited = next_index = first
        while True:
            while free and (talk := next(talks, None)) is not None:
                assert talk.index == next_index, (talk.index, next_index)
                next_index += 1
                if talk.messages or talk.ids:  # one whose prompt did not fit is over before it began
                    active[free.pop()] = talk
                else:
                    finished[talk.index] = talk
            while awaited in finished:
                yield finished.pop(awaited)
                awaited += 1
            if not active:
                return
            for lane in self._step(active):
                talk = active.pop(lane)
                finished[talk.index] = talk
                free.append(lane)
            check_interrupt()

    def _step(self, active: dict[int, Talk]) -> list[int]:
        """One pass over what is new in every lane, one token more for each. Returns the lanes that are done."""
        from ops.select import top_k

        lanes, talks = list(active), list(active.values())
        fed = np.array([talk.fed for talk in talks])
        counts = np.array([len(talk.ids) for talk in talks]) - fed
        token_ids = np.array([token for talk in talks for token in talk.ids[talk.fed :]], np.int32)
        plan = lane_plan(np.array(lanes), fed, counts, self.capacity)
        hidden = self.backbone.forward(token_ids[None], cache=self.cache, attend=plan, logits=None).hidden
        hidden = hidden.reshape(len(token_ids), -1)
        if len(token_ids) > len(lanes):
            hidden = hidden[(counts.cumsum() - 1).astype(np.int32)]
        logits = self.backbone.lm_logits(hidden)
        values, indices = (v.numpy() for v in top_k(logits, min(NUM_CANDIDATES, logits.shape[1])))
        temperatures = np.array([self.writer.temperature(talk) for talk in talks])
        uniforms = np.array([talk.uniform() if t > 0 else 0.0 for talk, t in zip(talks, temperatures, strict=True)])
        columns = sample(values, temperatures, self.writer.options.top_p, uniforms)
        done = []
        for row, (lane, talk) in enumerate(zip(lanes, talks, strict=True)):
            talk.fed = len(talk.ids)
            probability = 0.0
            if talk.phase == DECIDE:
                p = np.exp(values[row].astype(np.float64) - values[row, 0])
                probability = float(p[indices[row] == talk.awaited].sum() / p.sum())
            else:
                self.generated += 1
            if self.writer.take(talk, int(indices[row, columns[row]]), probability):
                done.append(lane)
        return done
