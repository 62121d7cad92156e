"""Fills a tree of fixed shape with a head's guesses; only nodes that have children are scored.

``draft`` takes the best candidates and waits for the device once; ``draft_sampled`` draws them, on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from decoding.sampling import draw_without_replacement, softmax
from decoding.tree import Tree
from decoding.verify import Distribution
from ops.select import top_k
from runtime import jt


class DraftPlan:
    """Where each node's token comes from, as constant indices, made once per tree.

    ``steps[d]`` scores the nodes at depth d that have children. With the tree of ``decoding.tree.Tree`` (parents
    [-1, 0, 0, 2]): step 0 scores the root and takes its 2 best, [a b]; step 1 scores node 2 alone, whose parent is row
    0 of step 0 and whose token is entry 1 of [a b], and takes its best, [c]. ``tokens`` = [0, 1, 2] then picks the
    drafted nodes 1, 2, 3 from the concatenated candidates of all steps, [a b c].
    """

    def __init__(self, tree: Tree):
        parents, ranks, depths = tree.parents, tree.ranks, tree.depths
        scored = np.array(tree.has_children)
        row_of = np.zeros(tree.num_nodes, np.int64)  # a scored node's row in its step
        source = np.zeros(tree.num_nodes, np.int64)  # a drafted node's entry among its parent's step's candidates
        self.steps: list[DraftStep] = []
        self.max_candidates = tree.max_rank + 1
        base, self.tokens = 0, np.zeros(tree.num_nodes - 1, np.int64)
        for depth in range(tree.depth):
            nodes = np.flatnonzero(scored & (depths == depth))
            row_of[nodes] = np.arange(len(nodes))
            children = np.flatnonzero(depths == depth + 1)
            num_candidates = int(ranks[children].max()) + 1
            rows = row_of[np.maximum(parents[nodes], 0)]
            self.steps.append(DraftStep(nodes, rows, source[nodes], num_candidates))
            source[children] = row_of[parents[children]] * num_candidates + ranks[children]
            self.tokens[children - 1] = base + source[children]
            base += len(nodes) * num_candidates
        # A parallel head gives one row of max_candidates per depth.
        self.parallel_tokens = ((depths - 1) * self.max_candidates + ranks)[1:].astype(np.int64)


class DraftStep:
    """One ``step`` call. nodes: (nodes,) of the tree; parents: (nodes,) their rows in the step before; source: (nodes,)
    their entries among its flat candidates."""

    def __init__(self, nodes: np.ndarray, parents: np.ndarray, source: np.ndarray, num_candidates: int):
        self.nodes, self.num_candidates = nodes, num_candidates
        self.parents, self.source = jt.array(parents.astype(np.int32)), jt.array(source.astype(np.int32))


@functools.lru_cache(maxsize=64)
def draft_plan(tree: Tree) -> DraftPlan:
    """The tree's DraftPlan, made on first use."""
    return DraftPlan(tree)


def draft(head, state, root_token: int, tree: Tree) -> np.ndarray:
    """Tokens of all nodes, (nodes,) int32 on the host; entry 0 is ``root_token``.

    state: what ``head.begin`` returned. A parallel head is called once for all depths, any other once a depth.
    ``decoding.tree.check_tree`` says whether the head can fill the tree.
    """
    if tree.depth == 0:
        return np.array([root_token], np.int32)
    plan = draft_plan(tree)
    if head.parallel:
        logits = head.score_depths(state, tree.depth)
        assert logits.shape[0] == tree.depth, (logits.shape, tree.depth)
        candidates = top_k(logits, plan.max_candidates)[1].numpy().reshape(-1)
        if head.draft_vocab is not None:
            candidates = head.draft_vocab[candidates]
        picked = candidates[plan.parallel_tokens]
    else:
        tokens, per_step = jt.array(np.array([root_token], np.int32)), []
        vocabulary = None if head.draft_vocab is None else jt.array(head.draft_vocab)  # column of the logits -> token
        for step in plan.steps:
            if per_step:
                tokens = per_step[-1].reshape(-1)[step.source]
            logits, state = head.step(state, tokens, step.parents)
            columns = top_k(logits, step.num_candidates)[1]
            per_step.append(columns if vocabulary is None else vocabulary[columns])
        picked = np.concatenate([ids.reshape(-1) for ids in jt.fetch_sync(per_step)])[plan.tokens]
    return np.concatenate([np.array([root_token], np.int32), picked], dtype=np.int32)


def draft_sampled(
    head, state, root_token: int, tree: Tree, temperature: float, rng: np.random.Generator
) -> tuple[np.ndarray, Distribution]:
    """As ``draft``, but the children of a node are drawn without replacement from softmax(logits / temperature).

    temperature: above 0. Draws are made in node order and ranks play no part: the first child of a node is its first
    draw, so a tree of ranks [0] and [2] drafts two tokens like one of [0] and [1]. Returns the tokens of all nodes,
    (nodes,) int32, and for ``verify_lossless`` the function from a node with children to the distribution that they
    were drawn from, (vocab,) float64.
    """
    tokens, drawn_from = np.full(tree.num_nodes, root_token, np.int32), {}
    for step, logits in _host_logits(head, state, tokens, tree):
        rows = softmax(logits, temperature)
        for node, row in zip(step.nodes.tolist(), np.broadcast_to(rows, (len(step.nodes), rows.shape[1])), strict=True):
            children = np.flatnonzero(tree.parents == node)
            columns = draw_without_replacement(row, len(children), rng)
            tokens[children] = columns if head.draft_vocab is None else head.draft_vocab[columns]
            drawn_from[node] = row

    def distribution(node: int) -> np.ndarray:
        if head.draft_vocab is None:
            return drawn_from[node]
        row = np.zeros(head.vocab_size)
        row[head.draft_vocab] = drawn_from[node]
        return row

    return tokens, distribution


def _host_logits(head, state, tokens: np.ndarray, tree: Tree) -> Iterator[tuple[DraftStep, np.ndarray]]:
    """Each step of the tree with its nodes' logits, (nodes, columns) float32, one row for all from a parallel head.
    tokens: (nodes,) of the tree, which the caller fills in before it asks for the next step."""
    steps = draft_plan(tree).steps
    if head.parallel and steps:
        by_depth = head.score_depths(state, tree.depth).numpy()
        assert len(by_depth) == tree.depth, (by_depth.shape, tree.depth)
        for step, row in zip(steps, by_depth, strict=True):
            yield step, row[None]
    else:
        for step in steps:
            logits, state = head.step(state, jt.array(tokens[step.nodes]), step.parents)
            yield step, logits.numpy()
