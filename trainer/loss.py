"""The training loss: of every depth the cross-entropy at labelled positions, the divergence from the backbone's
distribution there, or both; plus the head's own terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from heads.base import Features, Projection
from ops.linear_loss import linear_cross_entropy, soft_cross_entropy
from ops.training import cross_entropy
from runtime import jt
from runtime.types import Var
from trainer.config import LOSSES
from trainer.data.tokens import IGNORE, TokenizedData, labelled_positions


@dataclass
class Batch:
    """Some conversations laid end to end, all of an optimizer step or a part of them.

    token_ids: (1, tokens + depths) int32; positions: (num,) int32, those that carry loss; labels: (depths, num) int32,
    -100 where a depth has none; label_counts: (depths,) int64, labels of all of the step; share: of the step's
    positions that are in this batch.
    """

    features: Features
    token_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    label_counts: np.ndarray
    share: float = 1.0


def make_batch(
    data: TokenizedData, indices: Sequence[int], source, num_depths: int, step_indices: Sequence[int] | None = None
) -> Batch:
    """The batch of these conversations with features from ``source``.

    step_indices: all conversations of the optimizer step, when ``indices`` are a part of them.
    """
    part = data.select(indices)
    positions, labels = labelled_positions(part, num_depths)
    all_labels = labels if step_indices is None else labelled_positions(data.select(step_indices), num_depths)[1]
    padded = np.concatenate([part.token_ids, np.zeros(num_depths, np.int32)])
    return Batch(
        source(indices),
        padded[None],
        positions,
        labels,
        (all_labels != IGNORE).sum(1),
        1.0 if step_indices is None else len(positions) / max(1, all_labels.shape[1]),
    )


@dataclass(frozen=True)
class Objective:
    """What a depth learns at a position: the token that follows in the text (ce), the backbone's distribution of it
    (kl), or both (mix): (1 - kl_share) CE + kl_share KL(backbone || head).

    teacher: see ``trainer.features.teacher``; needed for kl and mix. A row of it without tokens has no divergence.
    """

    kind: str = "ce"
    kl_share: float = 0.5
    teacher: Callable | None = None

    def __post_init__(self):
        assert self.kind in LOSSES and 0 <= self.kl_share <= 1, (self.kind, self.kl_share)
        assert self.kind == "ce" or self.teacher is not None, self.kind

    @property
    def soft_share(self) -> float:
        """The divergence's share of a position's loss."""
        return {"ce": 0.0, "kl": 1.0, "mix": self.kl_share}[self.kind]


CROSS_ENTROPY = Objective()


@dataclass
class LossParts:
    """total: the scalar to minimize; depth_losses: one Var per depth that has logits, its cross-entropy in nats summed
    over the batch and divided by the step's labels, so that the parts of a step add up; ranks: Vars (num,) int32 per
    such depth, the vocabulary's size for a label that the head cannot draft; aux: the head's own terms; stats: its
    figures to report."""

    total: Var
    depth_losses: list[Var]
    ranks: list[Var]
    aux: dict[str, Var]
    stats: dict


def head_loss(head, batch: Batch, depth_weight: float, objective: Objective = CROSS_ENTROPY) -> LossParts:
    """sum_k depth_weight^k L_k / sum_k depth_weight^k + share sum aux, with L_k the sum of depth k's losses over the
    batch divided by its labels in all of the step, so that the totals of the parts of a step add up to the step's.

    The sums run over the depths that the head gave logits for. A label outside the head's draft vocabulary has no loss.
    Raises ValueError for a label outside the vocabulary.
    """
    if (highest := int(batch.labels.max(initial=IGNORE))) >= head.vocab_size:
        raise ValueError(
            f"label {highest} is outside the vocabulary of {head.vocab_size} tokens; "
            "was the text tokenized for another backbone?"
        )
    output = head(batch.features, batch.token_ids, batch.positions)
    assert len(output.logits) == head.num_depths, (len(output.logits), head.num_depths)
    given = [depth for depth, logits in enumerate(output.logits) if logits is not None]
    columns, counts = label_columns(head), np.maximum(batch.label_counts, 1)
    labels = batch.labels
    if columns is not None:
        labels = np.where(labels < 0, IGNORE, columns[np.maximum(labels, 0)])
    weights = np.array([depth_weight**depth for depth in given])
    scales = dict(zip(given, weights / weights.sum() / counts[given], strict=True))
    soft = _SoftTargets(head, batch, objective, columns) if objective.soft_share else None
    total, losses, ranks = 0, {}, {}
    for group in _groups(output.logits, given):
        row_weights = np.repeat([scales[depth] for depth in group], labels.shape[1]).astype(np.float32)
        targets = jt.array(labels[group].reshape(-1)), jt.array(row_weights), soft.at(group) if soft else None
        group_total, row_losses, row_ranks = _rows_loss(
            [output.logits[d] for d in group], *targets, objective.soft_share
        )
        total = total + group_total
        for i, depth in enumerate(group):
            rows = slice(i * labels.shape[1], (i + 1) * labels.shape[1])
            losses[depth] = row_losses[rows].sum() / float(counts[depth])
            ranks[depth] = row_ranks[rows]
            outside = (labels[depth] == IGNORE) & (batch.labels[depth] != IGNORE)  # of the draft vocabulary
            if outside.any():
                ranks[depth] = jt.where(jt.array(outside), head.vocab_size, ranks[depth])
    for term in output.aux.values():
        total = total + (term if batch.share == 1 else term * batch.share)
    return LossParts(total, [losses[d] for d in given], [ranks[d] for d in given], output.aux, output.stats)


def _groups(logits: list, given: list[int]) -> list[list[int]]:
    """Depths whose losses are computed together: those that share all weights. Their gradient is computed once."""
    groups: dict[tuple, list[int]] = {}
    for depth in given:
        entry = logits[depth]
        key = tuple(id(weight) for _, weight in entry.terms) if isinstance(entry, Projection) else (depth,)
        groups.setdefault(key, []).append(depth)
    return list(groups.values())


def _rows_loss(entries: list, labels: Var, row_weights: Var, soft: tuple | None, soft_share: float):
    """The weighted total, the cross-entropies and the ranks of depths that share their weights, laid end to end."""
    if isinstance(entries[0], Projection):
        parts = zip(*(entry.terms for entry in entries), strict=True)
        terms = [([hidden for hidden, _ in each], each[0][1]) for each in parts]
        return linear_cross_entropy(terms, labels, row_weights, soft, soft_share)
    (logits,) = entries
    if soft is None:
        losses, ranks = cross_entropy(logits, labels)
        return (losses * row_weights).sum(), losses, ranks
    losses, hard, ranks = soft_cross_entropy(logits, labels, soft, soft_share)
    return (losses * row_weights).sum(), hard, ranks


class _SoftTargets:
    """The teacher's distributions over what the head can draft, by depth."""

    def __init__(self, head, batch: Batch, objective: Objective, columns: np.ndarray | None):
        assert batch.token_ids.shape[0] == 1, batch.token_ids.shape
        tokens = batch.token_ids[0, : batch.token_ids.shape[1] - head.num_depths]
        offsets = np.concatenate([[0], np.cumsum(head.sequence_lengths(batch.features))])
        assert offsets[-1] == len(tokens), (offsets[-1], len(tokens))
        with jt.no_grad():
            self.ids, self.probabilities = objective.teacher(batch.features, tokens, offsets)
            if columns is not None:  # tokens become columns of the logits; without one they drop out of the total of 1
                self.ids = jt.where(self.ids < 0, -1, jt.array(columns)[jt.maximum(self.ids, 0)])
                draftable = self.probabilities * (self.ids >= 0).float32()
                sums = draftable.sum(1, keepdims=True)
                self.probabilities = draftable / jt.where(sums > 0, sums, jt.ones_like(sums))
        self.positions, self.last = batch.positions, len(tokens) - 1

    def at(self, depths: list[int]) -> tuple:
        """ids and probabilities, (depths * num, k) each. Depth k at position t scores token t + 2 + k, whose
        distribution is row t + 1 + k of the teacher."""
        rows = [np.minimum(self.positions + 1 + depth, self.last) for depth in depths]
        index = jt.array(np.concatenate(rows).astype(np.int32))
        return self.ids[index], self.probabilities[index]


def label_columns(head) -> np.ndarray | None:
    """The column of the logits of each token, -100 for one that the head cannot draft, (vocab,) int32; None when every
    token has its own."""
    if head.draft_vocab is None:
        return None
    columns = np.full(head.vocab_size, IGNORE, np.int32)
    columns[head.draft_vocab] = np.arange(len(head.draft_vocab))
    return columns
