"""The ranks of true tokens among a head's candidates, and what they say about trees. Pure functions of arrays.

Teacher forcing gives, for each position of a text, the rank of the true token at each depth: 0 where it is the head's
best guess. In the backbone's own greedy text, a tree accepts d tokens exactly when it has the path of the first d
ranks, so to count paths is to count accepted tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_RANK = 10  # candidates per node that are considered; published trees use ranks up to 9


def count_paths(ranks: np.ndarray) -> Counter:
    """How many positions have ranks that begin with each path. ranks: (depth, positions), negative where unknown.

    Worked example: positions with ranks (0, 1), (0, 0), (2, 0) give (0,): 2, (0, 1): 1, (0, 0): 1, (2,): 1, (2, 0): 1.
    """
    counts: Counter = Counter()
    alive = np.ones(ranks.shape[1], bool)
    for depth in range(ranks.shape[0]):
        alive &= (ranks[depth] >= 0) & (ranks[depth] < MAX_RANK)
        paths, times = np.unique(ranks[: depth + 1, alive], axis=1, return_counts=True)
        counts.update({tuple(int(r) for r in path): int(n) for path, n in zip(paths.T, times, strict=True)})
    return counts


def fitted_paths(counts: Counter, num_nodes: int) -> list[tuple[int, ...]]:
    """The num_nodes - 1 most frequent paths. A path's count never exceeds its parent's, and ties go to the shorter path
    and then to lower ranks, so the parent of every chosen path is chosen too: the list is a tree."""
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return ordered[: num_nodes - 1]


def last_accepted(ranks: np.ndarray, paths: Sequence[Sequence[int]]) -> np.ndarray:
    """The longest path that each position's ranks follow, (positions,) int64: 0 for none, i + 1 for ``paths[i]``.

    ranks: (depth, positions), negative where unknown; paths: all paths of a tree, each after its parent.

    Worked example, the paths [0], [1], [1, 0]: ranks (0, 0), (1, 0), (1, 3), (2, 0) give 1, 3, 2, 0.
    """
    nodes = {(): 0} | {tuple(path): node for node, path in enumerate(paths, start=1)}
    other = max((path[-1] for path in paths), default=-1) + 1  # stands for every rank that no node has
    child = np.full((len(nodes), other + 1), -1)
    for path in paths:
        child[nodes[tuple(path[:-1])], path[-1]] = nodes[tuple(path)]
    node, following = np.zeros(ranks.shape[1], np.int64), np.ones(ranks.shape[1], bool)
    for level in ranks[: max(map(len, paths), default=0)]:
        deeper = child[node, np.where((level < 0) | (level > other), other, level)]
        following &= deeper >= 0
        node = np.where(following, deeper, node)
    return node


def accepted_depths(ranks: np.ndarray, paths: Sequence[Sequence[int]]) -> np.ndarray:
    """The number of drafted tokens that a pass from each position accepts, (positions,) int64."""
    return np.array([0, *map(len, paths)])[last_accepted(ranks, paths)]


def walk(depths: np.ndarray, lengths: Sequence[int]) -> list[list[int]]:
    """Decode texts from what a pass at each position accepts: the tokens that each pass adds, text by text.

    depths: (positions,), see ``accepted_depths``, the texts one after another; lengths: (texts,), positions of each. A
    pass from a position that accepts d emits d + 1 tokens, as far as the text goes; the next pass begins after them.

    Worked example: one text of 4 positions that accept 2, 0, 0, 1: the first pass emits 3 tokens, the second, from the
    last position, one, where the text ends: [[3, 1]].
    """
    steps, first, passes = (np.asarray(depths) + 1).tolist(), 0, []
    for length in lengths:
        here, taken = 0, []
        while here < length:
            taken.append(min(steps[first + here], int(length) - here))
            here += taken[-1]
        passes.append(taken)
        first += length
    return passes
