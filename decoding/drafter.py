"""Drafts for one text, pass after pass: a chain in one call where the head can, else step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decoding.dynamic import fill
from decoding.rules import Rule
from decoding.tree import DynamicTree, Tree
from decoding.verify import Distribution
from heads.base import Features
from heads.chains import chain_of
from ops.draft import DTYPES, Chain
from runtime import jt
from runtime.types import Var

# The tree of a pass; the tokens of its nodes on the host, (nodes,) int32, and as the backbone takes them, (1, nodes);
# the distributions that the tokens were drawn from, None for best guesses.
Draft = tuple[Tree, np.ndarray, Var | np.ndarray, Distribution | None]


class StepDrafter:
    """Calls the head's ``begin`` and ``step``, or ``score_depths``, as the rule says."""

    def __init__(self, head, tree: Tree | DynamicTree, rule: Rule):
        self.head, self.tree, self.rule, self.layers = head, tree, rule, head.layers
        self.state = None

    def begin(self, output, prompt: np.ndarray, root: int) -> None:
        """Take the prefill's output, the prompt (tokens,) int32, and the first token of the text."""
        self.features, self.following = Features(output.hidden, output.layers), np.append(prompt[1:], root)

    def draft(self, root: int) -> Draft:
        """The tree after ``root``, the last token of the text."""
        following = jt.array(np.asarray(self.following, np.int32)[None])
        self.state = self.head.begin(self.features, following, self.state)
        tree, tokens, drawn_from = fill(self.rule, self.head, self.state, root, self.tree)
        return tree, tokens, tokens[None], drawn_from

    def accept(self, output, rows: np.ndarray, following: Sequence[int]) -> None:
        """Take the accepted rows of a pass, (accepted,) int32, and the token after each."""
        self.features, self.following = accepted_features(output, rows), following


class ChainDrafter:
    """Drafts with an ``ops.draft.Chain``, which reads the last row alone."""

    layers: tuple[int, ...] = ()

    def __init__(self, chain: Chain, tree: Tree):
        self.chain, self.tree = chain, tree

    def begin(self, output, prompt: np.ndarray, root: int) -> None:
        """As ``StepDrafter.begin``."""
        self.hidden, self.row = output.hidden, len(prompt) - 1

    def draft(self, root: int) -> Draft:
        """As ``StepDrafter.draft``."""
        ids = self.chain(self.hidden, self.row, root)
        return self.tree, ids.numpy()[0], ids, None

    def accept(self, output, rows: np.ndarray, following: Sequence[int]) -> None:
        """As ``StepDrafter.accept``."""
        self.hidden, self.row = output.hidden, int(rows[-1])


def make_drafter(head, tree: Tree | DynamicTree, rule: Rule, dtype: str) -> StepDrafter | ChainDrafter:
    """The drafter of this tree under this rule. dtype: of the matrices of a chain in one call.

    Raises ValueError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"draft_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    one_call = isinstance(tree, Tree) and tree.is_chain and not rule.sampled
    chain = chain_of(head, tree.depth, dtype) if one_call else None
    return StepDrafter(head, tree, rule) if chain is None else ChainDrafter(chain, tree)


def accepted_features(output, rows: np.ndarray) -> Features:
    """The accepted rows, on the device. output: BackboneOutput of a pass; rows: (accepted,) int32."""
    index = jt.array(rows)
    return Features(output.hidden[:, index], {i: layer[:, index] for i, layer in output.layers.items()})
