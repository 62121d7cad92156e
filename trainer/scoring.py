"""What held-out text says of a head: teacher-forced ranks, the score that picks a checkpoint, and the fitted tree.

``heads.ranks`` says what ranks are and counts their paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

import runtime
from heads.ranks import accepted_depths, count_paths, fitted_paths, walk
from runtime import jt
from runtime.ranks import sum_arrays
from trainer.data.tokens import TokenizedData, batches
from trainer.features.top_k import likeliest
from trainer.loss import head_loss, make_batch

STORED_NODES = 64  # paths stored with a checkpoint: the largest tree in the literature has 64 nodes
SCORED_TOKENS = 4096  # tokens of a scoring pass
MIN_REPLIES = 16  # with fewer of the backbone's own replies, all replies count


@dataclass
class Score:
    """What held-out text says. expected_accept_length: tokens per pass; top1, top5: per depth; loss: nats per depth;
    all three NaN at a depth without a label; tree: the paths that give it; stats: what the head reports of itself, see
    ``Head.describe``."""

    expected_accept_length: float
    top1: list[float]
    top5: list[float]
    loss: list[float]
    tree: list[list[int]]
    stats: dict

    @classmethod
    def restore(cls, stored: dict) -> Score:
        """A score as a state stores it: null stands for NaN, the figure of a depth without a label."""
        by_depth = {key: [np.nan if x is None else x for x in stored[key]] for key in ("top1", "top5", "loss")}
        return cls(**{**stored, **by_depth})


@dataclass
class RankedBatch:
    """Teacher-forced ranks of some sequences laid end to end.

    number: of the batch; indices: its sequences; positions: (num,) int32, counted from the first token of the first
    sequence; ranks: (depths, num) int32, negative without a label; losses: (depths,) mean nats of the labelled
    positions; stats: what the head reports, (num, ...) each.
    """

    number: int
    indices: list[int]
    positions: np.ndarray
    ranks: np.ndarray
    losses: np.ndarray
    stats: dict


def scoring_batches(data: TokenizedData) -> list[list[int]]:
    """The sequences of every scoring pass."""
    return batches(data, SCORED_TOKENS)


def teacher_forced_ranks(
    head, data: TokenizedData, source, numbers: Iterable[int] | None = None
) -> Iterator[RankedBatch]:
    """Yield a RankedBatch for each batch of ``scoring_batches(data)``: the ranks of the true tokens under ``head``.

    The head scores in evaluation mode, and is left in it. source(indices) -> Features of those sequences; numbers: of
    the batches wanted, in this order; default: all.
    """
    head.eval()
    parts = scoring_batches(data)
    for number in range(len(parts)) if numbers is None else numbers:
        ranks, losses, stats = np.zeros((head.num_depths, 0), np.int32), np.zeros(head.num_depths), {}
        with jt.no_grad():
            batch = make_batch(data, parts[number], source, head.num_depths)
            loss = head_loss(head, batch, 1.0) if len(batch.positions) else None
        if loss:
            found = jt.fetch_sync([*loss.ranks, *loss.depth_losses])
            ranks, losses = np.stack(found[: len(loss.ranks)]), np.concatenate(found[len(loss.ranks) :])
            stats = loss.stats
        yield RankedBatch(number, parts[number], batch.positions, ranks, losses, stats)


# From ranks to a score ------------------------------------------------------------------------------------------------


def own_replies(ranks: np.ndarray, lengths: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ranks, lengths) of the replies that the backbone would have generated itself, token by token; of all replies
    where there are fewer than ``MIN_REPLIES`` of those.

    ranks: (depth, positions), one reply after another; lengths: (replies,), positions of each; own: (positions,) bool,
    whether the token that the first depth drafts is the backbone's best guess. Greedy decoding generates no other text:
    in a sampled reply, or one by another author, a head meets tokens that it never has to draft.
    """
    starts = np.cumsum(lengths) - lengths
    generated = np.logical_and.reduceat(own, starts) if len(lengths) else np.zeros(0, bool)
    if generated.sum() < MIN_REPLIES:
        return ranks, np.asarray(lengths)
    return ranks[:, np.repeat(generated, lengths)], np.asarray(lengths)[generated]


def expected_accept_length(ranks: np.ndarray, lengths: np.ndarray, num_nodes: int) -> float:
    """Tokens per pass when the text is decoded with the fitted tree of num_nodes nodes (root included).

    ranks: (depth, positions), one reply after another; lengths: (replies,), positions of each. The passes are those
    that decoding the text would take. The mean over all positions would be higher, because a pass begins where the one
    before it failed, and hard positions come together. Positions without a label at the first depth are left out; one
    whose text ends within the tree counts as far as the text goes, as in decoding. Raises ValueError when no position
    has a label.
    """
    labelled = ranks[0] >= 0
    owners = np.repeat(np.arange(len(lengths)), lengths)[labelled]
    ranks = ranks[:, labelled]
    if ranks.shape[1] == 0:
        raise ValueError("the held-out text is too short: no position has a token to draft")
    paths = fitted_paths(count_paths(ranks), num_nodes)
    passes = walk(accepted_depths(ranks, paths), np.bincount(owners))
    return ranks.shape[1] / sum(map(len, passes))


def accuracy(ranks: np.ndarray, top: int) -> list[float]:
    """Share of labelled positions whose true token is among the ``top`` first, per depth, NaN without a label.
    ranks: (depth, positions)."""
    labelled = [row[row >= 0] for row in ranks]
    return [float((row < top).mean()) if len(row) else np.nan for row in labelled]


# Scoring a head -------------------------------------------------------------------------------------------------------


def own_tokens(backbone, data: TokenizedData, source) -> np.ndarray:
    """Where the text is what the backbone itself would have generated: (tokens,) bool, True at t where token t + 1 is
    its best guess. Computed by all ranks together. source(indices) -> Features."""
    found = np.zeros(int(data.offsets[-1]), np.int32)
    for indices in scoring_batches(data)[runtime.rank() :: runtime.world_size()]:
        hidden = source(indices).hidden
        best = likeliest(backbone, hidden.reshape(-1, hidden.shape[-1]), 1)[0].numpy().reshape(-1)
        start = 0
        for index in indices:
            first, last = int(data.offsets[index]), int(data.offsets[index + 1])
            found[first : last - 1] = best[start : start + last - first - 1] == data.token_ids[first + 1 : last]
            start += last - first
    return sum_arrays(found).astype(bool)


class _Totals:
    """What the scoring passes found, summed over batches and then over the ranks."""

    def __init__(self, num_batches: int, num_depths: int):
        self.ranks: dict[int, np.ndarray] = {}  # by batch; two more rows: 1 where a reply begins, own tokens
        self.counts = np.zeros(num_batches, np.int32)
        self.losses, self.labelled = np.zeros(num_depths), np.zeros(num_depths)
        self.stats: dict[str, np.ndarray] = {}

    def add(self, batches: Iterator[RankedBatch], data: TokenizedData, own: np.ndarray) -> _Totals:
        """Count batches in. own: (tokens,) bool, see ``own_tokens``."""
        for batch in batches:
            if not len(batch.positions):
                continue
            here = np.concatenate([own[data.offsets[i] : data.offsets[i + 1]] for i in batch.indices])
            begins = np.diff(batch.positions, prepend=-2) != 1
            more = np.stack([begins, here[batch.positions + 1]]).astype(np.int32)
            labelled = (batch.ranks >= 0).sum(1)
            self.losses += batch.losses * labelled
            self.labelled += labelled
            self.ranks[batch.number] = np.concatenate([batch.ranks, more])
            self.counts[batch.number] = len(batch.positions)
            for name, values in batch.stats.items():
                self.stats[name] = self.stats.get(name, 0) + np.asarray(values, np.float64).sum(0)
        return self

    def share(self) -> None:
        """Sum over the ranks; afterwards every rank has everything."""
        self.counts = sum_arrays(self.counts)
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        everything = np.zeros((len(self.losses) + 2, edges[-1]), np.int32)
        for number, ranks in self.ranks.items():
            everything[:, edges[number] : edges[number + 1]] = ranks
        self.ranks = {0: sum_arrays(everything)}
        self.losses, self.labelled = sum_arrays(self.losses), sum_arrays(self.labelled)
        self.stats = {name: sum_arrays(np.asarray(total)) for name, total in sorted(self.stats.items())}


def _score_batches(head, data: TokenizedData, source, own: np.ndarray) -> _Totals:
    """All held-out batches, dealt out to the ranks; where one of them would get nothing, each passes over all."""
    numbers = range(len(scoring_batches(data)))

    def totals(wanted: range) -> _Totals:
        ranked = teacher_forced_ranks(head, data, source, wanted)
        return _Totals(len(numbers), head.num_depths).add(ranked, data, own)

    found = totals(numbers[runtime.rank() :: runtime.world_size()])
    if sum_arrays(np.array([not found.ranks], np.int32))[0]:
        return totals(numbers)
    found.share()
    return found


def score_head(head, data: TokenizedData, source, num_nodes: int, own: np.ndarray) -> Score:
    """The score on all held-out conversations. Leaves the head in training mode.

    source(indices) -> Features; own: what ``own_tokens`` gave. Losses and accuracies are those of all
    the text; accept length and tree those of the replies that the backbone would have generated itself. Raises
    ValueError when the text is too short to score on.
    """
    totals = _score_batches(head, data, source, own)
    head.train()
    found = [totals.ranks[number] for number in sorted(totals.ranks)]
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
        np.divide(totals.losses, totals.labelled, np.full(len(ranks), np.nan), where=totals.labelled > 0).tolist(),
        [list(path) for path in tree],
        head.describe({name: total / ranks.shape[1] for name, total in totals.stats.items()}),
    )
