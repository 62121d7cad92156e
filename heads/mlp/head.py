"""Medusa-1 (arXiv 2401.10774, section 2.1): each depth guesses from the last hidden state alone."""

from __future__ import annotations

from dataclasses import dataclass

from heads.base import Head, HeadOutput, option
from heads.layers import Linear, ResidualBlock
from runtime import jt

LM_HEADS = ("own", "shared")


@dataclass
class Config:
    """Options of the MLP head."""

    num_depths: int = option(4, "tokens drafted after the root, one network each")
    num_layers: int = option(1, "residual blocks per depth, each with its own weights")
    lm_head: str = option("own", "own: a language-model head per depth, begun as a copy; shared: the backbone's")


class MLPHead(Head):
    """logits_k = W_k (x + SiLU(A_k x + b_k)), with x the last hidden state after the final norm.

    A_k starts at zero and W_k as the backbone's language-model head, so an untrained depth repeats the backbone's
    next-token guess.
    """

    Config = Config
    parallel = True

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.lm_head not in LM_HEADS:
            raise ValueError(f"lm_head must be one of {', '.join(LM_HEADS)}, got {config.lm_head!r}")
        if config.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {config.num_layers}")
        self.blocks = jt.nn.ModuleList(
            [
                jt.nn.Sequential(*[ResidualBlock(self.dim) for _ in range(config.num_layers)])
                for _ in range(config.num_depths)
            ]
        )
        if config.lm_head == "own":
            weight = backbone.lm_head_weight.numpy()
            self.lm_heads = jt.nn.ModuleList(
                [Linear(self.dim, self.vocab_size, bias=False, weight=weight) for _ in range(config.num_depths)]
            )

    def depth_logits(self, x, depth: int):
        """x: (rows, dim) -> (rows, vocab) for one depth."""
        y = self.blocks[depth](x)
        return self.lm_heads[depth](y) if self.config.lm_head == "own" else self.lm_logits(y)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        x = self.select(features.hidden, positions)
        return HeadOutput([self.depth_logits(x, k) for k in range(self.num_depths)])

    def begin(self, features, token_ids, state=None):
        rows = features.hidden.shape[1]
        return features.hidden[0, rows - 1 : rows], 0

    def step(self, state, token_ids, parents):
        x, depth = state
        x = x[parents]
        return self.depth_logits(x, depth), (x, depth + 1)

    def score_depths(self, state, num_depths):
        x, _ = state
        return jt.concat([self.depth_logits(x, k) for k in range(num_depths)], 0)
