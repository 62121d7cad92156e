"""What held-out text says of a head: teacher-forced ranks, and the score and the tree that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import runtime
from runtime import jt
from runtime.ranks import sum_arrays
from trainer.data import TokenizedData, batches
from trainer.loss import head_loss, make_batch
from trainer.score import accuracy, count_paths, expected_accept_length, fitted_paths

STORED_NODES = 64  # paths kept with a checkpoint: the largest tree in the literature has 64 nodes
HELD_OUT_TOKENS = 4096  # tokens of a scoring pass


@dataclass
class Score:
    """What held-out text says. expected_accept_length: tokens per pass; top1, top5: per depth; loss: nats per depth;
    tree: the paths that give it; stats: what the head says of itself, see ``Head.describe``."""

    expected_accept_length: float
    top1: list[float]
    top5: list[float]
    loss: list[float]
    tree: list[list[int]]
    stats: dict


class _Passes:
    """Passes over some of the held-out batches."""

    def __init__(self, head, data: TokenizedData, source):
        self.head, self.data, self.source = head, data, source
        self.parts = batches(data, HELD_OUT_TOKENS)
        self.ranks: dict[int, np.ndarray] = {}  # of each batch; the last row is 1 where a reply begins
        self.counts = np.zeros(len(self.parts), np.int32)
        self.losses, self.labelled = np.zeros(head.num_depths), np.zeros(head.num_depths)
        self.stats: dict[str, np.ndarray] = {}

    def run(self, wanted: range) -> None:
        """Pass over the batches of these numbers."""
        for index in wanted:
            batch = make_batch(self.data, self.parts[index], self.source, self.head.num_depths)
            if len(batch.positions):
                self._add(index, batch, head_loss(self.head, batch, 1.0))

    def _add(self, index: int, batch, parts) -> None:
        ranks = np.stack([r.numpy() for r in parts.ranks])
        labelled = (ranks >= 0).sum(1)
        begins = np.diff(batch.positions, prepend=-2) != 1
        ranks = np.concatenate([ranks, begins[None].astype(np.int32)])
        self.losses += np.array([float(x.item()) for x in parts.depth_losses]) * labelled
        self.labelled += labelled
        self.ranks[index], self.counts[index] = ranks, len(batch.positions)
        for name, values in parts.stats.items():
            self.stats[name] = self.stats.get(name, 0) + np.asarray(values, np.float64).sum(0)

    def share(self) -> None:
        """Add up what the ranks found: afterwards all of them know all of it."""
        self.counts = sum_arrays(self.counts)
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        whole = np.zeros((self.head.num_depths + 1, edges[-1]), np.int32)
        for index, ranks in self.ranks.items():
            whole[:, edges[index] : edges[index + 1]] = ranks
        whole = sum_arrays(whole)
        self.ranks = {i: whole[:, edges[i] : edges[i + 1]] for i in range(len(self.parts))}
        self.losses, self.labelled = sum_arrays(self.losses), sum_arrays(self.labelled)
        self.stats = {name: sum_arrays(np.asarray(total)) for name, total in sorted(self.stats.items())}


def _pass_over(head, data: TokenizedData, source) -> _Passes:
    """All held-out batches, dealt out to the ranks; where one of them would get nothing, each passes over all."""
    passes = _Passes(head, data, source)
    everything = range(len(passes.parts))
    passes.run(everything[runtime.rank() :: runtime.world_size()])
    idle = sum_arrays(np.array([not passes.ranks], np.int32))
    if not idle[0]:
        passes.share()
        return passes
    passes = _Passes(head, data, source)
    passes.run(everything)
    return passes


def score_head(head, data: TokenizedData, source, num_nodes: int) -> Score:
    """Teacher-forced ranks over all held-out conversations. Leaves the head in training mode.

    source(indices) -> Features. Raises ValueError when the text is too short to score on.
    """
    head.eval()
    with jt.no_grad():
        passes = _pass_over(head, data, source)
    head.train()
    found = [passes.ranks[index] for index in sorted(passes.ranks)]
    if not sum(part.shape[1] for part in found):
        raise ValueError("the held-out text is too short to score on; hold out more conversations")
    *ranks, begins = np.concatenate(found, 1)
    ranks, lengths = np.stack(ranks), np.diff(np.flatnonzero([*begins, 1]))
    tree = fitted_paths(count_paths(ranks), STORED_NODES)
    return Score(
        expected_accept_length(ranks, lengths, num_nodes),
        accuracy(ranks, 1),
        accuracy(ranks, 5),
        (passes.losses / np.maximum(passes.labelled, 1)).tolist(),
        [list(path) for path in tree],
        head.describe({name: total / ranks.shape[1] for name, total in passes.stats.items()}),
    )
