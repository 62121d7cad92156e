"""What recurrent heads share: one cell for all depths, told one token at each."""

from __future__ import annotations

import numpy as np

from heads.base import Features, Head, HeadOutput


class RecurrentHead(Head):
    """A head whose state at depth k + 1 follows from that at depth k and the token drafted between. A subclass says
    how it starts, advances and scores; a state is a tuple of Vars, (rows, width) each."""

    def start(self, hidden) -> tuple:
        """The state before any token. hidden: (rows, dim), the backbone's last hidden state."""
        raise TypeError(f"{type(self).__name__} does not define start")

    def advance(self, state: tuple, token_ids) -> tuple:
        """The state after one more token. token_ids: (rows,)."""
        raise TypeError(f"{type(self).__name__} does not define advance")

    def score(self, state: tuple):
        """The logits of the token that follows, (rows, vocab)."""
        raise TypeError(f"{type(self).__name__} does not define score")

    def project(self, state: tuple):
        """``score`` for the loss: the logits, or the ``Projection`` that they would be."""
        return self.score(state)

    def unroll(self, features: Features, token_ids, positions) -> list[tuple]:
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
