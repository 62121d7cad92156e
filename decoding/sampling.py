"""From logits to a token: temperature, top-k, nucleus, and draws with and without replacement, in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# The smallest probability that is not 0: quotients by it are finite, and no text is long enough to meet it.
RAREST = 1e-300


@dataclass(frozen=True)
class Sampler:
    """How the backbone's distribution is changed before a token is drawn from it.

    temperature: the logits are divided by it; 0 is greedy, all probability on the largest logit (the first of equals).
    top_k: then only the k most probable tokens stay; 0 keeps all. top_p: then only the nucleus stays (Holtzman et al.,
    arXiv 1904.09751): the fewest tokens, most probable first, whose share of what top-k left reaches top_p; 1 keeps
    all. Of equally probable tokens the one with the lower index comes first in both.

    Worked example: logits whose softmax is [.1 .4 .4 .1], top_k 3, top_p 0.8. Top-k leaves tokens 1, 2 and 0, shares
    4/9, 4/9 and 1/9; 4/9 does not reach 0.8, 8/9 does, so tokens 1 and 2 stay with probability 1/2 each.

    Raises ValueError for a temperature below 0 or not finite, a top_p outside (0, 1] and a top_k below 0.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number from 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be a whole number from 0, got {self.top_k}")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution of each row's token. logits: (rows, vocab) -> (rows, vocab) float64, each row sums to 1.

        Raises ValueError for a row whose largest logit is not finite.
        """
        logits = np.asarray(logits)
        assert logits.ndim == 2, logits.shape
        if not np.isfinite(logits.max(axis=1)).all():  # a nan is the largest of its row
            raise ValueError("the logits hold nan or infinity; nothing can be drawn from them")
        if self.temperature == 0:
            rows = np.zeros(logits.shape)
            rows[np.arange(len(rows)), logits.argmax(axis=1)] = 1.0
            return rows
        rows = softmax(logits, self.temperature)
        for row in rows:
            if 0 < self.top_k < len(row):
                _keep_most_probable(row, self.top_k)
            if self.top_p < 1:
                _keep_nucleus(row, self.top_p)
        return rows


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) of each row, (rows, vocab) float64. temperature: above 0.

    Probabilities below RAREST become 0.
    """
    shifted = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature gives minus infinity, which is probability 0
        rows = np.exp(shifted / temperature)
    rows[rows < RAREST] = 0.0
    return rows / rows.sum(axis=1, keepdims=True)


def draw(probabilities: np.ndarray, rng: np.random.Generator) -> int:
    """A token drawn in proportion to (vocab,) probabilities; never one whose probability is 0."""
    edges = np.cumsum(probabilities)
    token = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return token if token < len(edges) else int(np.flatnonzero(probabilities)[-1])  # rounded up to the last edge


def draw_without_replacement(probabilities: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """``num`` different tokens, (num,) int64, in the order in which they were drawn from (vocab,) probabilities.

    The Gumbel top-k trick (Kool et al., arXiv 1903.06059), with exponential clocks in place of Gumbel noise, of which
    they are a monotone function: token i rings after Exp(1) / p_i, and the first to ring are taken. Tokens of
    probability 0 never ring; they fill up where there are too few others. Probabilities above 0 are at least RAREST.
    """
    assert num <= len(probabilities), (num, probabilities.shape)
    times = np.full(len(probabilities), np.inf)
    np.divide(rng.standard_exponential(len(times)), probabilities, out=times, where=probabilities > 0)
    first = np.argpartition(times, num - 1)[:num]
    return first[np.argsort(times[first], kind="stable")]


def _keep_most_probable(row: np.ndarray, num: int) -> None:
    """Zero all but the ``num`` largest of (vocab,), of equals those with the lowest indices; renormalize."""
    last = np.partition(row, len(row) - num)[len(row) - num]
    equal = np.flatnonzero(row == last)
    row[row < last] = 0.0
    row[equal[num - np.count_nonzero(row > last) :]] = 0.0
    row /= row.sum()


def _keep_nucleus(row: np.ndarray, share: float) -> None:
    """Zero all of (vocab,) but the fewest largest that together reach ``share``; renormalize."""
    # Tokens below (1 - share) / vocab together hold less than 1 - share: the nucleus is among the others.
    likely = np.flatnonzero(row >= (1 - share) / len(row))
    order = likely[np.argsort(-row[likely], kind="stable")]
    size = int(np.searchsorted(np.cumsum(row[order]), share)) + 1
    nucleus = row[order[:size]]
    row[:] = 0.0
    row[order[:size]] = nucleus / nucleus.sum()
