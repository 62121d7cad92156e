"""How the loop chooses tokens: a rule drafts, reads the backbone's logits and accepts.

A rule serves one text at a time. ``start`` begins a text and resets the random numbers, so a text depends on the rule's
settings and seed and never on earlier texts. One NumPy Generator serves the first token, drafts and verification in
turn.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from decoding.draft import draft, draft_sampled
from decoding.sampling import Sampler, draw
from decoding.tree import Tree
from decoding.verify import (
    ALPHA,
    EPSILON,
    Distribution,
    check_thresholds,
    verify_greedy,
    verify_lossless,
    verify_typical,
)


class Rule(abc.ABC):
    """The interface of all rules.

    total_variation: the distance between the choice of a token and a draw from the sampler's distribution, summed over
    the tokens that passes emitted since ``start``; None for a rule that is exact.
    """

    total_variation: float | None = None
    sampled = False  # whether drafts are drawn, which only ``draft`` can do

    def start(self) -> None:  # noqa: B027 - a rule without random numbers has nothing to reset
        """Begin a text."""

    @abc.abstractmethod
    def read(self, output) -> np.ndarray:
        """What ``choose`` and ``accept`` need of a pass (a BackboneOutput of batch 1), on the host: (rows, ...). Each
        row stands alone, so one call may read the rows of several texts."""

    @abc.abstractmethod
    def choose(self, row: np.ndarray) -> int:
        """The first token of a text, from one row of what ``read`` returned."""

    def draft(self, head, state, root_token: int, tree: Tree) -> tuple[np.ndarray, Distribution | None]:
        """The tokens of all nodes, (nodes,) int32, and the distributions that they were drawn from; None for guesses
        that are a function of the text, here the head's best. state: what ``head.begin`` returned."""
        return draft(head, state, root_token, tree), None

    @abc.abstractmethod
    def accept(
        self, tree: Tree, tokens: np.ndarray, rows: np.ndarray, drawn_from: Distribution | None = None
    ) -> tuple[np.ndarray, int]:
        """The accepted path, (accepted + 1,) int32, and the bonus token of one pass. tokens, drawn_from: what ``draft``
        returned; rows: what ``read`` returned for the nodes, (nodes, ...)."""


class Greedy(Rule):
    """Take the backbone's most probable tokens: ``verify_greedy``. The argmax runs on the device."""

    def read(self, output) -> np.ndarray:
        return output.chosen.numpy()[0]

    def choose(self, row: np.ndarray) -> int:
        return int(row)

    def accept(
        self, tree: Tree, tokens: np.ndarray, rows: np.ndarray, drawn_from: Distribution | None = None
    ) -> tuple[np.ndarray, int]:
        return verify_greedy(tree.parents, tokens, rows)


class Lossless(Rule):
    """Draw every token from the sampler's distribution, drafted or not: ``verify_lossless``.

    seed: an int or several, as ``numpy.random.default_rng`` takes. sampled: drafts are drawn from the head's
    distribution, at the sampler's temperature (at 1 where that is 0); otherwise they are its best guesses. Without a
    head this is plain sampling. At temperature 0 the tokens are those of ``Greedy``.
    """

    def __init__(self, sampler: Sampler, seed: int | Sequence[int] = 0, sampled: bool = False):
        self.sampler, self.seed, self.sampled = sampler, seed, sampled
        self.start()

    def start(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def read(self, output) -> np.ndarray:
        return output.logits.numpy()[0]

    def choose(self, row: np.ndarray) -> int:
        return draw(self.sampler.probabilities(row[None])[0], self.rng)

    def draft(self, head, state, root_token: int, tree: Tree) -> tuple[np.ndarray, Distribution | None]:
        if not self.sampled:
            return super().draft(head, state, root_token, tree)
        return draft_sampled(head, state, root_token, tree, self.sampler.temperature or 1.0, self.rng)

    def accept(
        self, tree: Tree, tokens: np.ndarray, rows: np.ndarray, drawn_from: Distribution | None = None
    ) -> tuple[np.ndarray, int]:
        return verify_lossless(tree.parents, tokens, self._target(rows), self.rng, drawn_from)

    def _target(self, rows: np.ndarray) -> Distribution:
        """The sampler's distribution after a node. rows: (nodes, vocab) logits."""
        return lambda node: self.sampler.probabilities(rows[node : node + 1])[0]


class Typical(Lossless):
    """Accept likely guesses, draw the rest from the sampler's distribution: ``verify_typical``. The drafts are the
    head's best guesses; without a head this is plain sampling. It changes the distribution; ``total_variation`` says by
    how much.

    epsilon, alpha: of the threshold; the defaults are those of Medusa's code. Raises ValueError for an epsilon outside
    [0, 1] and an alpha that is negative or not finite.
    """

    def __init__(self, sampler: Sampler, epsilon: float = EPSILON, alpha: float = ALPHA, seed: int | Sequence[int] = 0):
        check_thresholds(epsilon, alpha)
        self.epsilon, self.alpha = epsilon, alpha
        super().__init__(sampler, seed)

    def start(self) -> None:
        super().start()
        self.total_variation = 0.0

    def accept(
        self, tree: Tree, tokens: np.ndarray, rows: np.ndarray, drawn_from: Distribution | None = None
    ) -> tuple[np.ndarray, int]:
        target = self._target(rows)
        path, bonus, distances = verify_typical(tree.parents, tokens, target, self.epsilon, self.alpha, self.rng)
        self.total_variation += float(distances.sum())
        return path, bonus
