"""What held-out text says of a head: teacher-forced ranks, and the score and the tree that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import runtime
from runtime import jt
from runtime.ranks import sum_arrays
from trainer.data.tokens import TokenizedData, batches
from trainer.features.top_k import likeliest
from trainer.loss import head_loss, make_batch
from trainer.score import accuracy, count_paths, expected_accept_length, fitted_paths, own_replies

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


def own_tokens(backbone, data: TokenizedData, source) -> np.ndarray:
    """Where the backbone itself would have gone on as the text does: (tokens,) bool, True at t where token t + 1 is its
    best guess. All ranks together. source(indices) -> Features."""
    found = np.zeros(int(data.offsets[-1]), np.int32)
    for indices in batches(data, HELD_OUT_TOKENS)[runtime.rank() :: runtime.world_size()]:
        hidden = source(indices).hidden
        best = likeliest(backbone, hidden.reshape(-1, hidden.shape[-1]), 1)[0].numpy().reshape(-1)
        start = 0
        for index in indices:
            first, last = int(data.offsets[index]), int(data.offsets[index + 1])
            here = best[start : start + last - first]
            found[first : last - 1] = here[:-1] == data.token_ids[first + 1 : last]
            start += last - first
    return sum_arrays(found).astype(bool)


class _Passes:
    """Passes over some of the held-out batches."""

    def __init__(self, head, data: TokenizedData, source, own: np.ndarray):
        self.head, self.data, self.source, self.own = head, data, source, own
        self.parts = batches(data, HELD_OUT_TOKENS)
        self.ranks: dict[int, np.ndarray] = {}  # of each batch; two more rows: 1 where a reply begins, own
        self.counts = np.zeros(len(self.parts), np.int32)
        self.losses, self.labelled = np.zeros(head.num_depths), np.zeros(head.num_depths)
        self.stats: dict[str, np.ndarray] = {}

    def run(self, wanted: range) -> None:
        """Pass over the batches of these numbers."""
        for index in wanted:
            batch = make_batch(self.data, self.parts[index], self.source, self.head.num_depths)
            if len(batch.positions):
                own = np.concatenate(
                    [self.own[self.data.offsets[i] : self.data.offsets[i + 1]] for i in self.parts[index]]
                )
                self._add(index, batch, head_loss(self.head, batch, 1.0), own[batch.positions + 1])

    def _add(self, index: int, batch, parts, own: np.ndarray) -> None:
        found = jt.fetch_sync([*parts.ranks, *parts.depth_losses])
        ranks, losses = np.stack(found[: len(parts.ranks)]), found[len(parts.ranks) :]
        labelled = (ranks >= 0).sum(1)
        begins = np.diff(batch.positions, prepend=-2) != 1
        ranks = np.concatenate([ranks, np.stack([begins, own]).astype(np.int32)])
        self.losses += np.array([loss.item() for loss in losses]) * labelled
        self.labelled += labelled
        self.ranks[index], self.counts[index] = ranks, len(batch.positions)
        for name, values in parts.stats.items():
            self.stats[name] = self.stats.get(name, 0) + np.asarray(values, np.float64).sum(0)

    def share(self) -> None:
        """Add up what the ranks found: afterwards all of them know all of it."""
        self.counts = sum_arrays(self.counts)
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        whole = np.zeros((self.head.num_depths + 2, edges[-1]), np.int32)
        for index, ranks in self.ranks.items():
            whole[:, edges[index] : edges[index + 1]] = ranks
        whole = sum_arrays(whole)
        self.ranks = {i: whole[:, edges[i] : edges[i + 1]] for i in range(len(self.parts))}
        self.losses, self.labelled = sum_arrays(self.losses), sum_arrays(self.labelled)
        self.stats = {name: sum_arrays(np.asarray(total)) for name, total in sorted(self.stats.items())}


def _pass_over(head, data: TokenizedData, source, own: np.ndarray) -> _Passes:
    """All held-out batches, dealt out to the ranks; where one of them would get nothing, each passes over all."""
    passes = _Passes(head, data, source, own)
    everything = range(len(passes.parts))
    passes.run(everything[runtime.rank() :: runtime.world_size()])
    idle = sum_arrays(np.array([not passes.ranks], np.int32))
    if not idle[0]:
        passes.share()
        return passes
    passes = _Passes(head, data, source, own)
    passes.run(everything)
    return passes


def score_head(head, data: TokenizedData, source, num_nodes: int, own: np.ndarray | None = None) -> Score:
    """Teacher-forced ranks over all held-out conversations. Leaves the head in training mode.

    source(indices) -> Features; own: what ``own_tokens`` gave, if it is known. Losses and accuracies are those of the
    whole text; accept length and tree those of the replies that the backbone would have written itself. Raises
    ValueError when the text is too short to score on.
    """
    own = own_tokens(head.borrowed, data, source) if own is None else own
    head.eval()
    with jt.no_grad():
        passes = _pass_over(head, data, source, own)
    head.train()
    found = [passes.ranks[index] for index in sorted(passes.ranks)]
    if not sum(part.shape[1] for part in found):
        raise ValueError("the held-out text is too short to score on; hold out more conversations")
    *ranks, begins, own = np.concatenate(found, 1)
    ranks, lengths = np.stack(ranks), np.diff(np.flatnonzero([*begins, 1]))
    counted, replies = own_replies(ranks, lengths, own.astype(bool))
    tree = fitted_paths(count_paths(counted), STORED_NODES)
    return Score(
        expected_accept_length(counted, replies, num_nodes),
        accuracy(ranks, 1),
        accuracy(ranks, 5),
        (passes.losses / np.maximum(passes.labelled, 1)).tolist(),
        [list(path) for path in tree],
        head.describe({name: total / ranks.shape[1] for name, total in passes.stats.items()}),
    )
