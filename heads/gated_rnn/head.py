"""A token-conditioned gated recurrence: every depth reads the token drafted before it."""

from __future__ import annotations

from dataclasses import dataclass

from heads.base import at_least, option
from heads.layers import Linear, RMSNorm
from heads.recurrent import RecurrentHead
from runtime import jt

CELLS = ("gated", "gru")


@dataclass
class Config:
    """Options of the gated RNN head."""

    num_depths: int = option(6, "tokens drafted after the root; the weights are shared, so this costs no parameters")
    cell: str = option("gated", "gated: one gate and a gated MLP that proposes the new state; gru: a GRU cell")
    inner_size: int = option(768, "width of the gated MLP that proposes the new state, with cell=gated")


class GatedRNNHead(RecurrentHead):
    """s_0 = h;  u = [n1(s_k); n2(e_k)];  s_{k+1} = g * s_k + (1 - g) * c;  logits_k = LM(s_{k+1})

    gated: g = sigmoid(W_g u + b_g),  c = W_o (silu(W_a u + b_a) * (W_b u + b_b))
    gru: [g; r] = sigmoid(W_g u + b),  c = tanh(W_c [r * n1(s_k); n2(e_k)] + b_c)   (arXiv 1406.1078, eq. 5 to 8)

    h: the last hidden state; e_k: the embedding of the token chosen before depth k's guess; n1, n2: RMSNorms; LM: the
    backbone's frozen language-model head. The gate keeps the context and lets each token overwrite the rest.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {config.cell!r}")
        at_least(config, inner_size=1)
        dim = self.dim
        self.state_norm, self.token_norm = RMSNorm(dim), RMSNorm(dim)
        if config.cell == "gru":
            self.gates = Linear(2 * dim, 2 * dim)
            self.proposal = Linear(2 * dim, dim)
            return
        self.joint = Linear(2 * dim, dim + 2 * config.inner_size)  # [W_g; W_a; W_b], one product while drafting
        self.proposal_down = Linear(config.inner_size, dim, bias=False)

    def advance(self, state, token_ids):
        s, e = self.state_norm(state[0]), self.token_norm(self.embed(token_ids))
        gate, proposal = self.gru(s, e) if self.config.cell == "gru" else self.gated(s, e)
        return (gate * state[0] + (1 - gate) * proposal,)

    def gated(self, s, e):
        """The gated cell's g and c, (rows, dim) each. s, e: normed state and embedding, (rows, dim)."""
        joint, inner = self.joint(jt.concat([s, e], 1)), self.config.inner_size
        gate, a, b = joint[:, : self.dim], joint[:, self.dim : -inner], joint[:, self.dim + inner :]
        return gate.sigmoid(), self.proposal_down(a * a.sigmoid() * b)

    def gru(self, s, e):
        """The GRU cell's g and c, (rows, dim) each. s, e: normed state and embedding, (rows, dim)."""
        gates = self.gates(jt.concat([s, e], 1)).sigmoid()
        reset = gates[:, self.dim :]
        return gates[:, : self.dim], self.proposal(jt.concat([reset * s, e], 1)).tanh()

    def start(self, hidden):
        return (hidden,)

    def score(self, state):
        return self.lm_logits(state[0])

    def project(self, state):
        return self.lm_projection(state[0])
