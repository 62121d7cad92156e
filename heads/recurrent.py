"""Recurrent heads: one cell for all depths, which reads one token at each."""

from __future__ import annotations

import numpy as np

from heads.base import Features, Head, HeadOutput, Projection
from runtime.types import Var

State = tuple[Var, ...]


class RecurrentHead(Head):
    """A head whose state at depth k + 1 follows from that at depth k and the token drafted between. A subclass defines
    ``start``, ``advance`` and ``score``; a state is a tuple of Vars, (rows, width) each."""

    def start(self, hidden: Var) -> State:
        """The state before any token. hidden: (rows, dim), the backbone's last hidden state."""
        raise TypeError(f"{type(self).__name__} does not define start")

    def advance(self, state: State, token_ids: Var | np.ndarray) -> State:
        """The state after one more token. token_ids: (rows,)."""
        raise TypeError(f"{type(self).__name__} does not define advance")

    def score(self, state: State) -> Var:
        """The logits of the next token, (rows, vocab)."""
        raise TypeError(f"{type(self).__name__} does not define score")

    def project(self, state: State) -> Projection | Var:
        """``score`` for ``execute``: the logits, or a ``Projection``."""
        return self.score(state)

    def unroll(self, features: Features, token_ids, positions) -> list[State]:
        """The state after each depth's token, under the true tokens; see ``execute`` for the arguments."""
        state, states = self.start(self.select(features.hidden, positions)), []
        for depth in range(self.num_depths):
            state = self.advance(state, self.following(np.asarray(token_ids), positions, depth))
            states.append(state)
        return states

    def execute(self, features, token_ids, positions) -> HeadOutput:
        return HeadOutput([self.project(state) for state in self.unroll(features, token_ids, positions)])

    def begin(self, features, token_ids, state=None):
        rows = features.hidden.shape[1]
        return self.start(features.hidden[0, rows - 1 : rows])

    def step(self, state, token_ids, parents):
        state = self.advance(tuple(part[parents] for part in state), token_ids)
        return self.score(state), state
