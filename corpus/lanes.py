"""Generates many conversations at once: one backbone pass serves all, each in a lane of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from corpus.dialogue import DECIDE, Dialogue, Writer
from corpus.options import NUM_CANDIDATES
from decoding.sampling import Sampler, draw, softmax
from runtime.interrupt import check_interrupt

# Jittor is loaded where it is used: a mistyped option is reported at once.
if TYPE_CHECKING:
    from backbone.model import Backbone


class Batch:
    """The lanes: each carries a conversation until it is over, then the next one. ``generated`` counts new tokens."""

    def __init__(self, backbone: Backbone, writer: Writer, num_lanes: int):
        """Raises ValueError for conversations longer than the backbone's positions."""
        from backbone.cache import BatchCache

        options = writer.options
        if options.max_length > backbone.config.max_positions:
            raise ValueError(
                f"--max-length is {options.max_length}, the backbone has {backbone.config.max_positions} positions"
            )
        self.backbone, self.writer, self.num_lanes, self.generated = backbone, writer, num_lanes, 0
        self.samplers = {t: Sampler(t, options.top_p) for t in (options.temperature_user, options.temperature) if t}
        self.cache = BatchCache(backbone.config, num_lanes, options.max_length, backbone.dtype)

    def run(self, dialogues: Iterator[Dialogue], first: int = 0) -> Iterator[Dialogue]:
        """Yield each conversation once it is over, in the order of their indices, which count up from ``first``.

        Ctrl-C takes effect between two passes.
        """
        free = list(range(self.num_lanes))[::-1]
        active: dict[int, Dialogue] = {}
        finished: dict[int, Dialogue] = {}
        awaited = next_index = first
        while True:
            while free and (dialogue := next(dialogues, None)) is not None:
                assert dialogue.index == next_index, (dialogue.index, next_index)
                next_index += 1
                if dialogue.messages or dialogue.ids:  # one whose prompt did not fit is over before it began
                    active[free.pop()] = dialogue
                else:
                    finished[dialogue.index] = dialogue
            while awaited in finished:
                yield finished.pop(awaited)
                awaited += 1
            if not active:
                return
            for lane in self._step(active):
                dialogue = active.pop(lane)
                finished[dialogue.index] = dialogue
                free.append(lane)
            check_interrupt()

    def _step(self, active: dict[int, Dialogue]) -> list[int]:
        """One pass over what is new in every lane, one token more for each. Returns the lanes that are done."""
        done = []
        values, ids = self._candidates(active)
        columns = self._choose(values, list(active.values()))
        for row, (lane, dialogue) in enumerate(active.items()):
            dialogue.fed = len(dialogue.ids)
            probability = 0.0
            if dialogue.phase == DECIDE:
                probability = float(softmax(values[row : row + 1], 1.0)[0, ids[row] == dialogue.awaited].sum())
            else:
                self.generated += 1
            if self.writer.take(dialogue, int(ids[row, columns[row]]), probability):
                done.append(lane)
        return done

    def _candidates(self, active: dict[int, Dialogue]) -> tuple[np.ndarray, np.ndarray]:
        """The largest logits after each lane's last token, (lanes, candidates) descending, and their tokens."""
        from ops.row_plan import RowPlan
        from ops.select import top_k

        lanes = list(active)
        new = [dialogue.ids[dialogue.fed :] for dialogue in active.values()]
        self.cache.lengths[lanes] = [dialogue.fed for dialogue in active.values()]
        plan = self.cache.plan(lanes, [RowPlan.chain(len(ids)) for ids in new])
        token_ids = np.array([token for ids in new for token in ids], np.int32)
        hidden = self.backbone.forward(token_ids[None], cache=self.cache.slots, attend=plan, logits=None).hidden
        hidden = hidden.reshape(len(token_ids), -1)
        if len(token_ids) > len(lanes):
            hidden = hidden[np.cumsum([len(ids) for ids in new], dtype=np.int32) - 1]
        logits = self.backbone.lm_logits(hidden)
        values, ids = (v.numpy() for v in top_k(logits, min(NUM_CANDIDATES, logits.shape[1])))
        self.cache.commit([np.arange(len(ids)) for ids in new])
        return values, ids

    def _choose(self, values: np.ndarray, dialogues: list[Dialogue]) -> np.ndarray:
        """The column of each conversation's next token, (lanes,): the first where it is greedy, else drawn with the
        conversation's own random numbers. values: see ``_candidates``."""
        columns = np.zeros(len(values), np.int64)
        temperatures = np.array([self.writer.temperature(dialogue) for dialogue in dialogues])
        for temperature, sampler in self.samplers.items():
            rows = np.flatnonzero(temperatures == temperature)
            if len(rows):
                for row, probabilities in zip(rows, sampler.probabilities(values[rows]), strict=True):
                    columns[row] = draw(probabilities, dialogues[row])
        return columns
