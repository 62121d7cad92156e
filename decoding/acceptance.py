"""What decoding a text with a tree would count, from ranks alone: trees are compared without a device or a clock.

Greedy decoding writes the same text with every tree, so one table of ranks (``heads.ranks``) says how any tree would
have decoded it: a pass follows the path of ranks from its position as far as the tree has it, and the next pass starts
after the bonus token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decoding.tree import Tree
from heads.ranks import MAX_RANK, last_accepted, walk


@dataclass(frozen=True)
class RankedText:
    """A greedy reply of n tokens and the ranks that a head gave them.

    ranks: (depths, n - 1) int32. Column i is drafted after reply token i (token 0 is the prefill's): row d holds the
    rank of token i + 1 + d, drafted at depth d + 1 after the true tokens; negative where that token is not known. It
    may be known past the end of the reply: generate drafts there too and counts by depth what it accepts.
    """

    ranks: np.ndarray
    prompt_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the reply, the prefill's included."""
        return self.ranks.shape[1] + 1


@dataclass(frozen=True)
class Replay:
    """The counts of some texts decoded with one tree, as ``decoding.loop.Generation`` has them.

    accepted_per_pass: for each text, the tokens that each pass added.
    """

    accepted_per_pass: list[list[int]]
    reached_by_depth: list[int]
    accepted_by_depth: list[int]

    @property
    def passes(self) -> int:
        """Backbone passes of all texts, without the prefills."""
        return sum(map(len, self.accepted_per_pass))

    @property
    def tokens(self) -> int:
        """Tokens of the passes; a text's first token is its prefill's."""
        return sum(map(sum, self.accepted_per_pass))

    @property
    def accept_length(self) -> float | None:
        """Tokens per pass, the bonus token included; None without a pass."""
        return self.tokens / self.passes if self.passes else None


def replay(
    texts: Sequence[RankedText], tree: Tree, max_new_tokens: int | None = None, cache_length: int | None = None
) -> Replay:
    """Decode texts with a tree from their ranks alone.

    max_new_tokens: where longer texts are cut. cache_length: rows of the cache; once the tree does not fit after the
    text, the rest is decoded token by token, as in ``generate``; None: there is always room.

    Worked example, chain of two (paths [0], [0, 0]) and a reply of 5 tokens with ranks at depth 1 of 0 0 3 0 and at
    depth 2 of 0 3 0 -1: the first pass accepts two and emits three tokens, the next starts at column 3, accepts one and
    emits the fifth, where the text ends: accepted_per_pass [3, 1], reached [2, 2], accepted [2, 1].
    """
    if not texts:
        return Replay([], [0] * tree.depth, [0] * tree.depth)
    most = None if max_new_tokens is None else max_new_tokens - 1  # the first token is the prefill's
    columns = [text.ranks[:, :most] for text in texts]
    ends = last_accepted(np.concatenate(columns, 1), tree.paths)
    lengths = [ranks.shape[1] for ranks in columns]
    rows = np.inf if cache_length is None else cache_length - tree.num_nodes
    # Where the tree fits after the root; elsewhere a pass drafts nothing.
    fits = np.concatenate([np.arange(n) + text.prompt_tokens <= rows for n, text in zip(lengths, texts, strict=True)])
    accepted_per_pass = walk(np.where(fits, tree.depths[ends], 0), lengths)
    # Steps of all texts add up to columns: each pass starts where the one before it ended.
    steps = np.array([tokens for accepted in accepted_per_pass for tokens in accepted], np.int64)
    starts = np.cumsum(steps) - steps
    return Replay(accepted_per_pass, *_by_depth(ends[starts[fits[starts]]], tree))


def _by_depth(ends: np.ndarray, tree: Tree) -> tuple[list[int], list[int]]:
    """(reached_by_depth, accepted_by_depth) of passes that end on these nodes."""
    last, open_ends = tree.depths[ends], np.array(tree.has_children)[ends]
    accepted = [int((last > depth).sum()) for depth in range(tree.depth)]
    reached = [count + int((open_ends & (last == depth)).sum()) for depth, count in enumerate(accepted)]
    return reached, accepted


def count_ranks(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each rank was the true token's, given that the depths before were right: (reached, accepted).

    ranks: (depths, positions). reached: (depths,), positions whose true tokens are candidates at all depths before and
    known at this one; accepted: (depths, MAX_RANK), those of them where rank r was the true token's. accepted[d] /
    reached[d] are the conditional probabilities that ``decoding.tree.best_tree`` takes. Worked example: positions (0,
    1), (0, -1), (MAX_RANK, 0) give reached [3, 1], accepted [2, 0, ..] and [0, 1, ..]: at the third the candidates of
    depth 0 miss, so depth 1 does not count there.
    """
    reached, accepted = np.zeros(len(ranks), np.int64), np.zeros((len(ranks), MAX_RANK), np.int64)
    alive = np.ones(ranks.shape[1], bool)
    for depth, level in enumerate(ranks):
        alive &= level >= 0
        reached[depth] = alive.sum()
        alive &= level < MAX_RANK
        accepted[depth] = np.bincount(level[alive], minlength=MAX_RANK)
    return reached, accepted
