"""EAGLE's autoregression on features (arXiv 2401.15077) with an LSTM cell in place of the decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import HeadOutput, at_least, option
from heads.layers import Linear, RMSNorm, later_positions, smooth_l1
from heads.recurrent import RecurrentHead
from runtime import jt


@dataclass
class Config:
    """Options of the LSTM head."""

    num_depths: int = option(6, "tokens drafted after the root; the weights are shared, so this costs no parameters")
    hidden_size: int = option(256, "width of the LSTM's state and cell")
    feature_weight: float = option(10.0, "weight of the feature loss; the cross-entropy has weight 1")


class LSTMEagleHead(RecurrentHead):
    """f_0 = the last hidden state, h_0 = 0, c_0 = W_c n1(f_0); at depth k

    [i; g; f; o] = W [n1(f_k); n2(e_k); h_k] + b
    c_{k+1} = sigmoid(f) * c_k + sigmoid(i) * tanh(g);  h_{k+1} = sigmoid(o) * tanh(c_{k+1})
    f_{k+1} = f_k + W_o h_{k+1};  logits_k = LM(f_{k+1})

    e_k: the embedding of the token chosen before depth k's guess; n1, n2: RMSNorms; LM: the backbone's frozen
    language-model head. f_{k+1} is the predicted feature of the row k + 1 later; aux["feature"] is its error.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, hidden_size=1, feature_weight=0)
        dim, size = self.dim, config.hidden_size
        self.feature_norm, self.token_norm = RMSNorm(dim), RMSNorm(dim)
        self.cell_start = Linear(dim, size, bias=False)
        self.gates = Linear(2 * dim + size, 4 * size)
        bias = np.zeros(4 * size, np.float32)
        bias[2 * size : 3 * size] = 1  # the forget gate is initially open
        self.gates.bias = jt.array(bias)
        self.output = Linear(size, dim, bias=False)

    def start(self, hidden):
        cell = self.cell_start(self.feature_norm(hidden))
        return hidden, jt.zeros_like(cell), cell

    def advance(self, state, token_ids):
        """state: the feature (rows, dim), h and cell (rows, size)."""
        feature, hidden, cell = state
        size = self.config.hidden_size
        x = jt.concat([self.feature_norm(feature), self.token_norm(self.embed(token_ids)), hidden], 1)
        z = self.gates(x)
        i, g, f, o = (z[:, n * size : (n + 1) * size] for n in range(4))
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        return feature + self.output(hidden), hidden, cell

    def score(self, state):
        return self.lm_logits(state[0])

    def project(self, state):
        return self.lm_projection(state[0])

    def execute(self, features, token_ids, positions) -> HeadOutput:
        lengths, states, loss = self.sequence_lengths(features), self.unroll(features, token_ids, positions), 0
        for depth, (feature, _, _) in enumerate(states):
            later, valid = later_positions(positions, lengths, depth + 1)
            loss = loss + smooth_l1(feature, self.select(features.hidden, later), valid)
        aux = {"feature": loss * (self.config.feature_weight / self.num_depths)}
        return HeadOutput([self.project(state) for state in states], aux)
