"""The shape of a draft: which node follows which. A tree is a value, made once; the tokens are data of each pass."""

from __future__ import annotations

import functools
import heapq
import itertools
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.files.shown import shown

# The default acceptance model: how often the backbone's choice is the head's first guess (TOP_1) or among its first
# five (TOP_5) at depths 1 to 4, given that the depth before was accepted; measured for a gated RNN head after five
# minutes of training on the embedded backbone (assets/tiny-vicuna/RECIPE.md). Deeper depths count as depth 4.
TOP_1 = (0.40, 0.35, 0.32, 0.31)
TOP_5 = (0.70, 0.64, 0.62, 0.62)
# The probabilities of ranks after the first fall like rank ** -DECAY, through TOP_5. The exponent is a choice: with 1.5
# the sum over all ranks stays below one; with 1 it would not. The accept lengths predicted for 4, 8, 16, 32, 64 nodes
# are 1.72 1.96 2.16 2.34 2.50; for that head 1.72 1.99 2.22 2.45 2.66 were measured.
DECAY = 1.5
# Far above the largest tree of the literature, 64 nodes: searching for the best tree takes memory for nodes squared.
MOST_NODES, MOST_RANKS = 2048, 1 << 31


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree of draft nodes. Node 0 is the root, the token the backbone has already chosen; its depth is 0.

    parents: (nodes,) int32, parents[0] = -1. ranks: (nodes,) int32, the node's place among its parent's candidates,
    best first; ranks[0] = 0. Nodes are in breadth-first order: by depth, then by parent, then by rank.

    Worked example, four tokens: ``Tree.from_paths([[0], [1], [1, 0]])`` is

        0 root          parents [-1, 0, 0, 2]    paths [0], [1], [1, 0] (of nodes 1, 2, 3)
        |-- 1 rank 0    depths  [ 0, 1, 1, 2]    num_nodes 4, depth 2, max_rank 1
        `-- 2 rank 1    ranks   [ 0, 0, 1, 0]
            `-- 3 rank 0

    Node 1 drafts the head's best guess for the token after the root, node 2 its second best, node 3 the best guess
    after node 2. Raises ValueError for arrays that are no such tree.
    """

    parents: np.ndarray
    ranks: np.ndarray

    def __post_init__(self):
        if len(self.parents) > MOST_NODES:
            raise ValueError(f"a tree has at most {MOST_NODES:,} nodes, got {len(self.parents):,}")
        parents, ranks = np.array(self.parents, np.int32), np.array(self.ranks, np.int32)
        if parents.ndim != 1 or parents.shape != ranks.shape or len(parents) == 0 or parents[0] != -1 or ranks[0] != 0:
            raise ValueError(f"a tree starts with parent -1 and rank 0, got {parents.tolist()} and {ranks.tolist()}")
        depths = np.zeros(len(parents), np.int32)
        for node in range(1, len(parents)):
            parent = parents[node]
            if not 0 <= parent < node or ranks[node] < 0:
                raise ValueError(f"node {node} must name an earlier node and a rank, got {parent} and {ranks[node]}")
            depths[node] = depths[parent] + 1
        keys = list(zip(depths.tolist(), parents.tolist(), ranks.tolist(), strict=True))
        if any(before >= after for before, after in itertools.pairwise(keys)):
            raise ValueError(f"nodes must be in breadth-first order, got parents {parents.tolist()}, {ranks.tolist()}")
        for name, array in (("parents", parents), ("ranks", ranks), ("depths", depths)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> Tree:
        """A tree from one rank path per node, in any order, as Medusa (arXiv 2401.10774) writes them; see ``paths``.

        Raises ValueError, naming the path, for an empty path, a negative or non-integer rank, a duplicate, and a path
        whose parent is missing.
        """
        nodes: dict[tuple[int, ...], int] = {}
        for path in paths:
            key = tuple(path)
            if not key:
                raise ValueError("got an empty path []; the root is implied")
            whole = all(isinstance(r, numbers.Integral) and not isinstance(r, bool) for r in key)
            if not whole or not all(0 <= r < MOST_RANKS for r in key):
                raise ValueError(f"path {shown(list(key))} must hold ranks, integers from 0 to {MOST_RANKS - 1:,}")
            key = tuple(int(r) for r in key)
            if key in nodes:
                raise ValueError(f"path {shown(list(key))} is given twice")
            nodes[key] = 0
        ordered = sorted(nodes, key=lambda key: (len(key), key))
        index = {(): 0} | {key: i + 1 for i, key in enumerate(ordered)}
        for key in ordered:
            if key[:-1] not in index:
                raise ValueError(f"path {shown(list(key))} has no parent; add {shown(list(key[:-1]))}")
        return cls([-1, *(index[key[:-1]] for key in ordered)], [0, *(key[-1] for key in ordered)])

    @classmethod
    def chain(cls, num_drafts: int) -> Tree:
        """The root and ``num_drafts`` tokens after it, each the best guess after the last. ValueError below 0."""
        if num_drafts < 0:
            raise ValueError(f"a chain drafts at least 0 tokens, got {num_drafts}")
        if num_drafts >= MOST_NODES:
            raise ValueError(f"a tree has at most {MOST_NODES:,} nodes, got a chain of {shown(num_drafts)}")
        return cls(np.arange(num_drafts + 1) - 1, np.zeros(num_drafts + 1))

    @staticmethod
    @functools.cache
    def autoregressive() -> Tree:
        """The root alone: a pass that drafts nothing."""
        return Tree.chain(0)

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, the root included: rows of one backbone pass."""
        return len(self.parents)

    @functools.cached_property
    def depth(self) -> int:
        """Draft tokens on the longest path; 0 for a lone root."""
        return int(self.depths[-1])

    @functools.cached_property
    def max_rank(self) -> int:
        """The highest rank of any node: the head's candidates 0 to max_rank are drafted."""
        return int(self.ranks.max())

    @functools.cached_property
    def has_children(self) -> tuple[bool, ...]:
        """(nodes,): whether a node has children."""
        inner = set(self.parents.tolist())
        return tuple(node in inner for node in range(self.num_nodes))

    @functools.cached_property
    def is_chain(self) -> bool:
        """Whether every node but the last has one child, the best guess; a lone root is one."""
        return self.depth == self.num_nodes - 1 and self.max_rank == 0

    @property
    def paths(self) -> list[list[int]]:
        """The ranks along the way from the root to each other node, in node order."""
        paths: list[list[int]] = [[]]
        for node in range(1, self.num_nodes):
            paths.append([*paths[self.parents[node]], int(self.ranks[node])])
        return paths[1:]

    @functools.cached_property
    def plan(self):
        """The tree as the backbone reads it, an ``ops.row_plan.RowPlan``, made on first use."""
        from ops.row_plan import RowPlan  # here, so that trees can be made without Jittor

        return RowPlan(self.parents)

    @functools.cached_property
    def _key(self) -> bytes:
        return self.parents.tobytes() + self.ranks.tobytes()

    def __eq__(self, other) -> bool:
        return isinstance(other, Tree) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def default_acceptance(depth: int, num_ranks: int) -> np.ndarray:
    """The default acceptance model (TOP_1, TOP_5, DECAY), (depth, num_ranks) float64.

    Entry [d, r]: probability that the backbone chooses rank r at depth d + 1, given that depth d was accepted.
    """
    tail = np.arange(1, num_ranks, dtype=np.float64) ** -DECAY
    share = (np.arange(1, 5, dtype=np.float64) ** -DECAY).sum()
    table = np.empty((depth, num_ranks))
    for d in range(depth):
        top_1, top_5 = TOP_1[min(d, len(TOP_1) - 1)], TOP_5[min(d, len(TOP_5) - 1)]
        table[d] = [top_1, *((top_5 - top_1) / share * tail)]
    return table


def default_tree(num_nodes: int = 64, depth: int = 4) -> Tree:
    """The best tree of ``num_nodes`` nodes, root included, at most ``depth`` deep, under the default acceptance model.

    Raises ValueError for num_nodes < 1, and for depth < 1 where there is more than the root.
    """
    if num_nodes == 1:
        return Tree.autoregressive()
    if num_nodes > MOST_NODES:
        raise ValueError(f"a tree has at most {MOST_NODES:,} nodes, got {shown(num_nodes)}")
    if num_nodes < 1 or depth < 1:
        raise ValueError(f"a tree needs a node and, past the root, a depth of at least 1; got {num_nodes} and {depth}")
    return best_tree(num_nodes, default_acceptance(depth, num_nodes - 1))


def best_tree(num_nodes: int, acceptance: np.ndarray) -> Tree:
    """The tree of ``num_nodes`` nodes with the highest expected accept length.

    acceptance: (depth, ranks), entry [d, r] the probability that rank r is the backbone's choice at depth d + 1,
    given that the node at depth d was accepted. A node is accepted with the product along its path, and the
    expected accept length is the sum of these products over the nodes (the root's is 1: the bonus token). No child's
    product exceeds its parent's, so the ``num_nodes`` largest products always form a tree: to take the best open node
    again and again is optimal. Of equals, the shallower and then the lower rank is taken first.

    Raises ValueError for probabilities outside [0, 1], and when depth and ranks do not give that many nodes.
    """
    acceptance = np.asarray(acceptance, np.float64)
    if acceptance.ndim != 2:
        raise ValueError(f"acceptance must be (depth, ranks), got shape {acceptance.shape}")
    if not ((acceptance >= 0) & (acceptance <= 1)).all():
        raise ValueError("acceptance must hold probabilities from 0 to 1")
    if num_nodes < 1:
        raise ValueError(f"a tree has at least its root, got num_nodes={num_nodes}")
    depth, ranks = acceptance.shape
    table, paths = acceptance.tolist(), []
    open_nodes = [(-1.0, 0, ())]  # (negative product, depth, rank path)
    for _ in range(num_nodes):
        if not open_nodes:
            most = sum(ranks**d for d in range(depth + 1))
            raise ValueError(f"depth {depth} with {ranks} ranks gives at most {most} nodes, asked for {num_nodes}")
        score, level, path = heapq.heappop(open_nodes)
        paths.append(path)
        if level < depth:
            for rank, chance in enumerate(table[level]):
                heapq.heappush(open_nodes, (score * chance, level + 1, (*path, rank)))
    return Tree.from_paths(paths[1:])


def check_tree(tree: Tree, head_depths: int, vocab_size: int) -> None:
    """Raises ValueError when a head of ``head_depths`` tokens over ``vocab_size`` words cannot fill the tree."""
    if tree.depth > head_depths:
        raise ValueError(
            f"the tree has depth {tree.depth}, the head drafts {head_depths} tokens; "
            f"use --nodes or a tree of depth at most {head_depths}"
        )
    if tree.max_rank >= vocab_size:
        raise ValueError(
            f"the tree takes {tree.max_rank + 1} candidates of a node, the vocabulary has {vocab_size} tokens; "
            "use a tree with fewer children"
        )


@dataclass(frozen=True)
class DynamicTree:
    """The limits of a tree that every pass shapes (``decoding.dynamic``): ``num_nodes`` with the root, ``depth``,
    and ``width`` nodes expanded at each depth, with ``width`` candidates each. Nodes whose confidence is below
    ``min_confidence`` are left out: a row that is hardly ever accepted costs more than it gains. Raises ValueError for
    limits that no tree meets.
    """

    num_nodes: int
    depth: int
    width: int = 8
    min_confidence: float = 0.0

    def __post_init__(self):
        if self.depth < 1 or self.width < 1 or self.num_nodes < 2:
            raise ValueError(
                f"a dynamic tree needs at least 2 nodes, depth 1 and width 1; got {self.num_nodes}, {self.depth} and "
                f"{self.width}"
            )
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence must be a probability below 1, got {self.min_confidence}")
        most = self.depth * self.width**2 + self.width - self.width**2 + 1
        if self.num_nodes > most:
            raise ValueError(
                f"depth {self.depth} and width {self.width} give at most {most} nodes, asked for {self.num_nodes}"
            )

    def check(self, head_depths: int, vocab_size: int) -> None:
        """Raises ValueError when a head of ``head_depths`` tokens over ``vocab_size`` words cannot draft as deep and as
        wide."""
        check_tree(Tree.chain(self.depth), head_depths, vocab_size)
        if self.width > vocab_size:
            raise ValueError(f"the width is {self.width}, the head's vocabulary has {vocab_size} tokens")
