"""ReDrafter (arXiv 2403.09919): a recurrent state of the drafted tokens, beside the context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import at_least, option
from heads.layers import Linear, ResidualBlock, RMSNorm
from heads.recurrent import RecurrentHead
from runtime import jt

LM_HEADS = ("own", "shared")


@dataclass
class Config:
    """Options of the ReDrafter head."""

    num_depths: int = option(6, "tokens drafted after the root; the weights are shared, so this costs no parameters")
    num_layers: int = option(1, "residual blocks between the state and the language-model head")
    lm_head: str = option("own", "own: a language-model head over both halves; shared: a projection and the backbone's")


class ReDrafterHead(RecurrentHead):
    """s_0 = 0;  s_{k+1} = SiLU(W n(e_k) + U s_k + b);  logits_k = V (residual blocks of [h; s_{k+1}])

    h: the last hidden state, the same at every depth; e_k: the embedding of the token chosen before depth k's guess;
    n: an RMSNorm. V is initially the backbone's language-model head on h and zero on s, so an untrained depth repeats
    the backbone's next-token guess.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, num_layers=1)
        if config.lm_head not in LM_HEADS:
            raise ValueError(f"lm_head must be one of {', '.join(LM_HEADS)}, got {config.lm_head!r}")
        dim = self.dim
        self.token_norm = RMSNorm(dim)
        self.recurrence = Linear(2 * dim, dim)  # [W U]
        self.blocks = jt.nn.Sequential(*[ResidualBlock(2 * dim) for _ in range(config.num_layers)])
        on_context = backbone.lm_head_weight if config.lm_head == "own" else jt.array(np.eye(dim, dtype=np.float32))
        weight = jt.concat([on_context, jt.zeros(tuple(on_context.shape))], 1)
        self.output = Linear(2 * dim, weight.shape[0], bias=False, weight=weight)

    def start(self, hidden):
        return hidden, jt.zeros_like(hidden)

    def advance(self, state, token_ids):
        context, s = state
        s = self.recurrence(jt.concat([self.token_norm(self.embed(token_ids)), s], 1))
        return context, s * s.sigmoid()

    def score(self, state):
        y = self.output(self.blocks(jt.concat(state, 1)))
        return y if self.config.lm_head == "own" else self.lm_logits(y)

    def project(self, state):
        x = self.blocks(jt.concat(state, 1))
        return self.output.project(x) if self.config.lm_head == "own" else self.lm_projection(self.output(x))
