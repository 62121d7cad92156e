"""Fake heads that know the text, or part of it, or nothing, and trees: decoding needs no trained head."""

from types import SimpleNamespace

import numpy as np

from decoding.tree import Tree, default_tree
from heads.base import Head
from runtime import jt

NUM_NEW = 48
# Enough known tokens to draft after the last one of the text.
NUM_KNOWN = NUM_NEW + 16

TREES = {
    "pair": Tree.chain(1),
    "chain": Tree.chain(4),
    "four": Tree.from_paths([[0], [1], [1, 0]]),
    "gap": Tree.from_paths([[2], [0], [2, 1], [2, 1, 0], [0, 3]]),
    "default": default_tree(16, 4),
}


class KnowingHead(Head):
    """Knows the text that the backbone will write and offers its tokens at given ranks.

    known: prompt and continuation. rank_of(index, depth): the rank at which the true token ``known[index]`` is
    offered at depth ``depth`` (1 for the root's children), None for never. The state holds where in the text the draft
    starts and how deep it is.
    """

    Config = SimpleNamespace

    def __init__(self, backbone, known, rank_of, num_depths=4):
        super().__init__(SimpleNamespace(num_depths=num_depths), backbone)
        self.known, self.rank_of = list(known), rank_of
        self.rows_begun, self.rows_scored, self.calls = 0, [], 0
        self.eval()

    def begin(self, features, token_ids, state=None):
        rows = features.hidden.shape[1]
        assert features.hidden.shape == (1, rows, self.dim) and tuple(token_ids.shape) == (1, rows)
        before = 0 if state is None else int(state.numpy()[0, 0])
        known = self.known[before + 1 : before + 1 + rows]
        assert token_ids.numpy()[0].tolist() == known, "the rows and the tokens after them do not line up"
        return jt.array(np.array([[before + rows, 0]], np.int32))

    def guess(self, index, depth):
        """Logits (vocab,) with ``known[index]`` at its rank; past the known text, a fixed order."""
        logits = -np.arange(self.vocab_size, dtype=np.float32)
        if index < len(self.known):
            truth, rank = self.known[index], self.rank_of(index, depth)
            others = [token for token in range(self.vocab_size) if token != truth]
            order = [*others[:rank], truth, *others[rank:]] if rank is not None else [*others, truth]
            logits[order] = -np.arange(self.vocab_size, dtype=np.float32)
        return logits


class SequentialHead(KnowingHead):
    """Called depth by depth; a node whose path is not the true text guesses nothing true."""

    def step(self, state, token_ids, parents):
        self.calls += 1
        rows, depth = state.numpy()[parents.numpy()].T
        tokens = token_ids.numpy()
        self.rows_scored.append(len(tokens))
        logits, right = [], []
        for start, level, token in zip(rows, depth, tokens, strict=True):
            index = start + level  # of this node's token in the text, if its path is right
            on_path = start >= 0 and index < len(self.known) and self.known[index] == token
            right.append(start if on_path else -1)
            logits.append(self.guess(index + 1 if on_path else len(self.known), level + 1))
        state = np.stack([np.array(right, np.int32), depth + 1], 1).astype(np.int32)
        return jt.array(np.stack(logits)), jt.array(state)


class ParallelHead(KnowingHead):
    """Called once for all depths."""

    parallel = True

    def score_depths(self, state, num_depths):
        self.calls += 1
        start = int(state.numpy()[0, 0])
        return jt.array(np.stack([self.guess(start + d, d) for d in range(1, num_depths + 1)]))


class MixingHead(Head):
    """Its logits are a fixed random function of all tokens from the root down, so that one wrong ``parents`` entry
    changes the draft."""

    Config = SimpleNamespace

    def __init__(self, backbone, num_depths=4, seed=0):
        super().__init__(SimpleNamespace(num_depths=num_depths), backbone)
        random = np.random.default_rng(seed)
        self.token_rows = jt.array(random.standard_normal((self.vocab_size, 8), np.float32)).stop_grad()
        self.mix = jt.array(random.standard_normal((8, 8), np.float32)).stop_grad()
        self.out = jt.array(random.standard_normal((8, self.vocab_size), np.float32)).stop_grad()
        self.eval()

    def begin(self, features, token_ids, state=None):
        return features.hidden[0, -1:, :8]

    def step(self, state, token_ids, parents):
        state = jt.tanh(jt.matmul(state[parents], self.mix) + self.token_rows[token_ids])
        return jt.matmul(state, self.out), state


RANKS = {
    "all": lambda index, depth: 0,
    "none": lambda index, depth: None,
    "prefix": lambda index, depth: 0 if depth <= 2 else None,
    "mixed": lambda index, depth: (index * 7 + index // 3) % 4,
}
FAKES = [f"{kind}-{name}" for kind in ("sequential", "parallel") for name in RANKS] + ["mixing"]
