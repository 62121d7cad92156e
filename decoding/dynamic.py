"""Trees that each pass shapes for itself, where the head is confident (EAGLE-2, arXiv 2406.16858, section 4).

A candidate's confidence is the product of the head's probabilities along its path. At every depth the ``width`` most
confident candidates are expanded, ``width`` guesses each; at the end the ``num_nodes - 1`` most confident of all
candidates become the tree. A child is never more confident than its parent, so what is chosen is a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from decoding.tree import DynamicTree, Tree, check_tree
from ops.select import top_k_log_probabilities
from runtime import jt


def fill(rule, head, state, root_token: int, tree) -> tuple[Tree, np.ndarray, object]:
    """The tree of a pass, its tokens, and what they were drawn from: ``rule.draft`` of a Tree, or what a DynamicTree
    comes to."""
    if isinstance(tree, DynamicTree):
        return *draft_dynamic(head, state, root_token, tree), None
    tokens, drawn_from = rule.draft(head, state, root_token, tree)
    return tree, tokens, drawn_from


def check_shape(tree, head, rule) -> None:
    """Raises ValueError when the head cannot fill the tree, a Tree or a DynamicTree, or the rule cannot use it."""
    if isinstance(tree, DynamicTree):
        tree.check(head.num_depths, head.num_draftable)
        if getattr(rule, "sampled", False):
            raise ValueError("drawn drafts need a tree that is fixed before they are drawn; a dynamic tree is not")
    else:
        check_tree(tree, head.num_depths, head.num_draftable)


@dataclass
class Level:
    """The candidates of one depth, parents in order and ranks in order within a parent: breadth-first as they are.

    parents: (candidates,) index into the level above; ranks, tokens: (candidates,); scores: log of the confidence.
    """

    parents: np.ndarray
    ranks: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray


def best(scores: np.ndarray, num: int) -> np.ndarray:
    """The indices of the ``num`` largest scores in ascending order; of equals the first ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:num])


def draft_dynamic(head, state, root_token: int, shape: DynamicTree) -> tuple[Tree, np.ndarray]:
    """The tree of this pass and the tokens of its nodes, (nodes,) int32. state: what ``head.begin`` returned."""
    width, levels = shape.width, []
    guesses = parallel_guesses(head, state, shape) if head.parallel else None
    tokens, scores, parents = np.array([root_token], np.int32), np.zeros(1), np.zeros(1, np.int32)
    expanded = np.zeros(1, np.int64)
    for depth in range(shape.depth):
        if guesses:
            values, ids = (np.broadcast_to(each[depth], (len(expanded), width)) for each in guesses)
        else:
            logits, state = head.step(state, jt.array(tokens[expanded]), jt.array(parents))
            values, ids = jt.fetch_sync(list(top_k_log_probabilities(logits, width)))
            ids = ids if head.draft_vocab is None else head.draft_vocab[ids]
        level = Level(
            np.repeat(expanded, width),
            np.tile(np.arange(width, dtype=np.int32), len(expanded)),
            np.ascontiguousarray(ids).reshape(-1).astype(np.int32),
            (scores[expanded][:, None] + values).reshape(-1),
        )
        levels.append(level)
        scores, tokens = level.scores, level.tokens
        # A node's state lies in the row of its parent among the nodes just expanded.
        expanded = best(scores, width)
        parents = (expanded // width).astype(np.int32)
    return assemble(levels, root_token, shape.num_nodes)


def parallel_guesses(head, state, shape: DynamicTree) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities and tokens of a parallel head's best guesses, (depth, width) each."""
    values, ids = jt.fetch_sync(list(top_k_log_probabilities(head.score_depths(state, shape.depth), shape.width)))
    return values, ids if head.draft_vocab is None else head.draft_vocab[ids]


def assemble(levels: list[Level], root_token: int, num_nodes: int) -> tuple[Tree, np.ndarray]:
    """The ``num_nodes - 1`` most confident candidates as a tree, and the nodes' tokens.

    Worked example, two levels: a (-1) and b (-2) behind the root, c (-1.5) and d (-4) behind a. Three nodes besides
    the root are a, b and c.
    """
    ends = np.cumsum([len(level.scores) for level in levels])
    begins = ends - [len(level.scores) for level in levels]
    scores = np.concatenate([level.scores for level in levels])
    # Of equals the shallower goes first, and so does a parent before a child of the same confidence.
    kept = best(scores, num_nodes - 1)
    behind = [begin + level.parents for begin, level in zip(begins, levels[1:], strict=False)]
    above = np.concatenate([np.full(len(levels[0].parents), -1), *behind])
    place = np.zeros(len(scores) + 1, np.int64)
    place[kept] = np.arange(1, len(kept) + 1)
    ranks = np.concatenate([level.ranks for level in levels])[kept]
    tokens = np.concatenate([level.tokens for level in levels])[kept]
    tree = Tree(np.append(-1, place[above[kept]]), np.append(0, ranks))
    return tree, np.append(root_token, tokens).astype(np.int32)
