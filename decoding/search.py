"""Finds the fastest tree for a machine, from its latency curve and the ranks of texts.

A larger tree accepts more tokens a pass and makes the pass longer, so the best size depends on what one more row costs:
next to nothing on a GPU that waits for its memory, nearly a row's arithmetic on a CPU. Nothing here runs on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from decoding.acceptance import RankedText, Replay, replay
from decoding.tree import Tree
from heads.ranks import count_paths, fitted_paths

# Any two trees of a shortlist differ in their number of nodes by at least this factor.
APART = 1.3


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """y at x by linear interpolation, xs ascending; beyond the last point the last slope continues, if it is positive.

    Worked example: points (1, 10), (3, 20) give 15 at 2, 10 at 0 and 30 at 5.
    """
    if x > xs[-1] and len(xs) > 1:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return float(ys[-1] + max(slope, 0.0) * (x - xs[-1]))
    return float(np.interp(x, xs, ys))


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of a pass by its parts, on one machine after a text of ``context`` tokens.

    rows, verify_s: the backbone over that many rows. begin_s: the head's ``begin``. widths, draft_s: drafting down to
    depth d + 1 takes draft_s[i][d] where every depth after the root scores widths[i] nodes. rest_s: everything else in
    a pass that drafts; root_rest_s: in a pass that does not. chain_s: ``begin`` and a chain of 1, 2, .. tokens where
    the head drafts chains in one call, else None.
    """

    context: int
    rows: list[int]
    verify_s: list[float]
    begin_s: float
    widths: list[int]
    draft_s: list[list[float]]
    rest_s: float
    root_rest_s: float
    chain_s: list[float] | None = None

    def verify(self, num_rows: int) -> float:
        """Seconds of the backbone over ``num_rows`` rows."""
        return interpolate(num_rows, self.rows, self.verify_s)

    def drafting(self, tree: Tree) -> float:
        """Seconds of the head: ``begin``, and each depth with as many nodes to score as the tree has there."""
        if tree.depth == 0:
            return 0.0
        if self.chain_s and tree.is_chain:
            return self.chain_s[tree.depth - 1]
        per_depth = np.diff(np.maximum.accumulate(np.array(self.draft_s), axis=1), axis=1, prepend=0.0)
        inner = np.bincount(tree.depths[np.array(tree.has_children)], minlength=tree.depth)
        scored = zip(inner.tolist(), per_depth.T.tolist(), strict=False)
        return self.begin_s + sum(interpolate(nodes, self.widths, seconds) for nodes, seconds in scored)

    def seconds_per_pass(self, tree: Tree) -> float:
        """The expected duration of a pass with this tree."""
        rest = self.rest_s if tree.depth else self.root_rest_s
        return self.verify(tree.num_nodes) + self.drafting(tree) + rest


@dataclass(frozen=True)
class Candidate:
    """A tree and what is expected of it."""

    tree: Tree
    replay: Replay
    seconds_per_pass: float

    @property
    def accept_length(self) -> float:
        """Tokens per pass."""
        length = self.replay.accept_length
        assert length is not None, "every text ends with its prefill's token"
        return length

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding."""
        return self.accept_length / self.seconds_per_pass


def search(
    texts: Sequence[RankedText],
    seconds_per_pass: Callable[[Tree], float],
    max_nodes: int,
    cache_length: int | None = None,
) -> list[Candidate]:
    """All candidate trees, the fastest first; of equals, the one with fewer nodes.

    Candidates are the lone root, the chains, and for each depth that the ranks reach the most frequent paths of at most
    that depth, in every size from 2 to ``max_nodes`` nodes. Raises ValueError for max_nodes < 1 and when no text is
    longer than one token.
    """
    if max_nodes < 1:
        raise ValueError(f"a tree has at least its root, got max_nodes={max_nodes}")
    if not any(text.num_tokens > 1 for text in texts):
        raise ValueError("no text is longer than one token: there is nothing to draft")
    trees = [Tree.autoregressive()]
    num_depths = len(texts[0].ranks)
    counts = count_paths(np.concatenate([text.ranks for text in texts], 1))
    for depth in range(1, num_depths + 1):
        if depth < max_nodes:
            trees.append(Tree.chain(depth))
        paths = fitted_paths({path: count for path, count in counts.items() if len(path) <= depth}, max_nodes)
        trees += [Tree.from_paths(paths[:size]) for size in range(1, len(paths) + 1)]
    found = [Candidate(tree, replay(texts, tree, None, cache_length), seconds_per_pass(tree)) for tree in unique(trees)]
    return sorted(found, key=lambda each: (-each.tokens_per_s, each.tree.num_nodes))


def unique(trees: Sequence[Tree]) -> list[Tree]:
    """The trees without duplicates, in order."""
    return list(dict.fromkeys(trees))


def shortlist(ordered: Sequence[Candidate], num_trees: int) -> list[Candidate]:
    """The lone root and the best trees whose sizes differ by at least the factor APART, ``num_trees`` in all.

    ordered: what ``search`` returned. A cost model errs in the same direction for similar trees, so to time the second
    best of all would tell nothing new.
    """
    chosen = [next(each for each in ordered if each.tree.depth == 0)]
    for each in ordered:
        sizes = [other.tree.num_nodes for other in chosen if other.tree.depth]
        apart = all(max(each.tree.num_nodes, size) >= APART * min(each.tree.num_nodes, size) for size in sizes)
        if each.tree.depth and apart and len(chosen) < num_trees:
            chosen.append(each)
    return chosen


def refine(texts: Sequence[RankedText], tree: Tree, cache_length: int | None = None, rounds: int = 3) -> Tree:
    """A tree of the same size and depth that accepts more, or the tree itself.

    Passes do not start at every position: after a miss the next draft starts at the missed token. So paths are counted
    again only where the passes of this tree start, until nothing changes or for ``rounds`` rounds.
    """
    best, best_length = tree, replay(texts, tree, None, cache_length).accept_length
    for _ in range(rounds):
        again = replay(texts, tree, None, cache_length).accepted_per_pass
        columns = [
            text.ranks[: tree.depth, np.cumsum([0, *accepted[:-1]])]
            for text, accepted in zip(texts, again, strict=True)
            if accepted
        ]
        paths = fitted_paths(count_paths(np.concatenate(columns, 1)), best.num_nodes)
        if Tree.from_paths(paths) == tree or len(paths) < best.num_nodes - 1:
            break
        tree = Tree.from_paths(paths)
        length = replay(texts, tree, None, cache_length).accept_length
        if length > best_length:
            best, best_length = tree, length
    return best
