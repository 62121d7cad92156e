"""The training loss: cross-entropy of every depth at the positions that carry a label, and what the head adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import Features
from ops.training import cross_entropy
from runtime import jt
from trainer.data import IGNORE, TokenizedData, targets, useful_positions


@dataclass
class Batch:
    """Some conversations laid end to end. token_ids: (1, tokens + depths) int32; positions: (num,) int32, those whose
    draft can be scored; labels: (depths, num) int32, -100 where a depth has none."""

    features: Features
    token_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def make_batch(data: TokenizedData, indices, source, num_depths: int) -> Batch:
    """The batch of these conversations with features from ``source``.

    A position counts when the token after it is the assistant's (while decoding, the root always is) and at least
    one depth has a label.
    """
    part = data.select(indices)
    labels = targets(part.mask, part.token_ids, part.offsets, num_depths)
    root_is_reply = np.append(part.mask[1:], False)
    positions = useful_positions(labels)
    positions = positions[root_is_reply[positions]].astype(np.int32)
    padded = np.concatenate([part.token_ids, np.zeros(num_depths, np.int32)])
    return Batch(source(indices), padded[None], positions, np.ascontiguousarray(labels[:, positions]))


@dataclass
class LossParts:
    """total: the scalar to minimise; depth_losses: mean nats per labelled position, one Var per depth that has logits;
    ranks: Vars (num,) int32 per such depth, the vocabulary's size for a label that the head cannot draft; aux: the
    head's own terms; stats: its figures to report."""

    total: object
    depth_losses: list
    ranks: list
    aux: dict
    stats: dict


def head_loss(head, batch: Batch, depth_weight: float) -> LossParts:
    """sum_k depth_weight^k CE_k / sum_k depth_weight^k, plus the head's aux terms. CE_k averages over its labels.

    The sums run over the depths that the head gave logits for. A label outside the head's draft vocabulary has no loss.
    """
    highest = int(batch.labels.max(initial=IGNORE))
    assert highest < head.vocab_size, f"label {highest} is outside the vocabulary of {head.vocab_size}"
    output = head(batch.features, batch.token_ids, batch.positions)
    assert len(output.logits) == head.num_depths, (len(output.logits), head.num_depths)
    columns = label_columns(head)
    weights = np.array([depth_weight**k if logits is not None else 0.0 for k, logits in enumerate(output.logits)])
    weights /= weights.sum()
    total, depth_losses, ranks = 0, [], []
    for logits, tokens, weight in zip(output.logits, batch.labels, weights, strict=True):
        if logits is None:
            continue
        labels = tokens if columns is None else np.where(tokens == IGNORE, IGNORE, columns[np.maximum(tokens, 0)])
        losses, rank = cross_entropy(logits, jt.array(labels))
        mean = losses.sum() / max(1, int((labels != IGNORE).sum()))
        total = total + mean * float(weight)
        depth_losses.append(mean)
        if columns is not None:
            rank = jt.where(jt.array((labels == IGNORE) & (tokens != IGNORE)), head.vocab_size, rank)
        ranks.append(rank)
    for term in output.aux.values():
        total = total + term
    return LossParts(total, depth_losses, ranks, output.aux, output.stats)


def label_columns(head) -> np.ndarray | None:
    """The column of the logits that stands for each token, -100 for one that the head cannot draft, (vocab,) int32;
    None when every token has its own."""
    if head.draft_vocab is None:
        return None
    columns = np.full(head.vocab_size, IGNORE, np.int32)
    columns[head.draft_vocab] = np.arange(len(head.draft_vocab))
    return columns
