"""A token-conditioned gated recurrence: every depth is told the token drafted before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import Head, HeadOutput, option
from heads.layers import Linear, RMSNorm
from runtime import jt


@dataclass
class Config:
    """Options of the gated RNN head."""

    num_depths: int = option(4, "tokens drafted after the root; the weights are shared, so this costs no parameters")
    inner_size: int = option(768, "width of the gated MLP that proposes the new state")


class GatedRNNHead(Head):
    """s_0 = h;  u = [norm(s_k), norm(e_k)];  c = W_o (silu(W_a u) * W_b u);  g = sigmoid(W_g u + b)
    s_{k+1} = g * s_k + (1 - g) * c;  logits_k = LM(s_{k+1})

    h: the last hidden state; e_k: the embedding of the token chosen before depth k's guess; LM: the backbone's frozen
    language-model head. The gate keeps what the context says and lets each token overwrite the rest.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.inner_size < 1:
            raise ValueError(f"inner_size must be at least 1, got {config.inner_size}")
        dim = self.dim
        self.state_norm, self.token_norm = RMSNorm(dim), RMSNorm(dim)
        self.gate = Linear(2 * dim, dim)
        self.proposal_gate = Linear(2 * dim, config.inner_size, bias=False)
        self.proposal_up = Linear(2 * dim, config.inner_size, bias=False)
        self.proposal_down = Linear(config.inner_size, dim, bias=False)

    def advance(self, state, token_ids):
        """One step of the recurrence. state: (rows, dim), token_ids: (rows,) -> (rows, dim)."""
        u = jt.concat([self.state_norm(state), self.token_norm(self.embed(token_ids))], 1)
        a = self.proposal_gate(u)
        proposal = self.proposal_down(a * a.sigmoid() * self.proposal_up(u))
        gate = self.gate(u).sigmoid()
        return gate * state + (1 - gate) * proposal

    def execute(self, features, token_ids, positions) -> HeadOutput:
        state, logits = self.select(features.hidden, positions), []
        for depth in range(self.num_depths):
            state = self.advance(state, self.following(np.asarray(token_ids), positions, depth))
            logits.append(self.lm_logits(state))
        return HeadOutput(logits)

    def begin(self, features, token_ids, state=None):
        rows = features.hidden.shape[1]
        return features.hidden[0, rows - 1 : rows]

    def step(self, state, token_ids, parents):
        state = self.advance(state[parents], token_ids)
        return self.lm_logits(state), state
