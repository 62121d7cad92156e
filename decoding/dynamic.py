"""Trees that each pass shapes where the head is confident (EAGLE-2, arXiv 2406.16858, section 4).

A candidate's confidence is the product of the head's probabilities along its path. At every depth the ``width`` most
confident candidates are expanded by ``width`` guesses each; the ``num_nodes - 1`` most confident of all candidates
become the tree. A child is never more confident than its parent, so they do form a tree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from decoding.tree import DynamicTree, Tree, check_tree
from decoding.verify import Distribution
from ops.select import top_k_log_probabilities
from runtime import jt


def fill(rule, head, state, root_token: int, tree) -> tuple[Tree, np.ndarray, Distribution | None]:
    """The tree of a pass, its tokens, and what they were drawn from: by ``rule.draft`` for a Tree, by ``draft_dynamic``
    for a DynamicTree."""
    if isinstance(tree, DynamicTree):
        return *draft_dynamic(head, state, root_token, tree), None
    tokens, drawn_from = rule.draft(head, state, root_token, tree)
    return tree, tokens, drawn_from


def check_shape(tree, head, rule=None) -> None:
    """Raises ValueError when the head cannot fill the tree, fixed or dynamic, or the rule cannot use it."""
    if isinstance(tree, DynamicTree):
        tree.check(head.num_depths, head.num_draftable)
        if rule is not None and rule.sampled:
            raise ValueError("drawn drafts need a tree that is fixed before they are drawn; a dynamic tree is not")
    else:
        check_tree(tree, head.num_depths, head.num_draftable)


class Candidate(NamedTuple):
    """A token that may become a node. score: log of its confidence; parent: its parent's index among the candidates, -1
    for the root; row: its parent's index among the nodes expanded at that depth; rank: its own among its siblings."""

    score: float
    parent: int
    row: int
    rank: int
    token: int


def draft_dynamic(head, state, root_token: int, shape: DynamicTree) -> tuple[Tree, np.ndarray]:
    """The tree of this pass and the tokens of its nodes, (nodes,) int32. state: what ``head.begin`` returned.

    Plain Python: some ten candidates a depth are too few for arrays to pay off.
    """
    # Candidates of a node beyond the size of the tree change nothing.
    width, candidates = min(shape.width, shape.num_nodes - 1), []
    least = math.log(shape.min_confidence) if shape.min_confidence else -math.inf
    guesses = parallel_guesses(head, state, shape.depth, width) if head.parallel else None
    expanded = [(-1, 0.0)]  # index among the candidates, and score
    tokens, parents = [root_token], [0]
    for depth in range(shape.depth):
        if guesses:
            values, ids = ([each[depth]] * len(expanded) for each in guesses)
        else:
            values, ids, state = head.best(state, np.array(tokens, np.int32), np.array(parents, np.int32), width)
            values, ids = values.tolist(), ids.tolist()
        first = len(candidates)
        for row, (place, score) in enumerate(expanded):
            for rank, (value, token) in enumerate(zip(values[row], ids[row], strict=True)):
                if score + value < least:
                    break  # those that follow are worse
                candidates.append(Candidate(score + value, place, row, rank, token))
        chosen = best(candidates, range(first, len(candidates)), width)
        if not chosen:
            break  # nothing deeper can be confident enough
        expanded = [(place, candidates[place].score) for place in chosen]
        tokens = [candidates[place].token for place in chosen]
        parents = [candidates[place].row for place in chosen]
    return assemble(candidates, root_token, shape.num_nodes)


def best(candidates: Sequence[Candidate], places: Iterable[int], num: int) -> list[int]:
    """The ``num`` places (indices of candidates) with the highest scores, ascending; of equals the first ones."""
    return sorted(sorted(places, key=lambda place: -candidates[place].score)[:num])


def parallel_guesses(head, state, depth: int, width: int) -> tuple[list, list]:
    """Log probabilities and tokens of a parallel head's best guesses, (depth, width) each."""
    values, ids = jt.fetch_sync(list(top_k_log_probabilities(head.score_depths(state, depth), width)))
    return values.tolist(), (ids if head.draft_vocab is None else head.draft_vocab[ids]).tolist()


def assemble(candidates: Sequence[Candidate], root_token: int, num_nodes: int) -> tuple[Tree, np.ndarray]:
    """The ``num_nodes - 1`` most confident candidates as a tree, and the nodes' tokens. Candidates are breadth-first.

    Worked example: a (-1) and b (-2) after the root, c (-1.5) and d (-4) after a. Four nodes are the root, a, b and c.
    """
    # Of equals the shallower is taken first: a parent before a child of the same confidence.
    chosen = best(candidates, range(len(candidates)), num_nodes - 1)
    node = {place: number for number, place in enumerate(chosen, start=1)} | {-1: 0}
    parents = tuple(node[candidates[place].parent] for place in chosen)
    tree = known_tree(parents, tuple(candidates[place].rank for place in chosen))
    return tree, np.array([root_token, *(candidates[place].token for place in chosen)], np.int32)


@functools.lru_cache(maxsize=4096)
def known_tree(parents: tuple[int, ...], ranks: tuple[int, ...]) -> Tree:
    """The tree of these parents and ranks, without the root's. Small trees recur, and a Tree caches its plan."""
    return Tree([-1, *parents], [0, *ranks])
