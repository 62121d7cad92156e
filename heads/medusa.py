"""Parallel heads, and Medusa's networks, which more than one head trains."""

from __future__ import annotations

from dataclasses import dataclass

from heads.base import Head, HeadOutput, at_least, option
from heads.layers import DepthLMHeads, LMHeadOptions, ResidualBlock
from runtime import jt
from runtime.types import Var


class ParallelHead(Head):
    """A head whose depths all guess from the last hidden state alone. A subclass sets ``lm_heads``, see
    ``heads.layers.DepthLMHeads``, and defines their input."""

    parallel = True

    def depth_hidden(self, x: Var, depth: int) -> Var:
        """The input of a depth's language-model head. x: (rows, dim) -> (rows, dim)."""
        raise TypeError(f"{type(self).__name__} does not define depth_hidden")

    def execute(self, features, token_ids, positions) -> HeadOutput:
        x = self.select(features.hidden, positions)
        return HeadOutput([self.lm_heads.project(self.depth_hidden(x, k), k) for k in range(self.num_depths)])

    def begin(self, features, token_ids, state=None):
        rows = features.hidden.shape[1]
        return features.hidden[0, rows - 1 : rows], 0

    def step(self, state, token_ids, parents):
        x, depth = state
        x = x[parents]
        return self.lm_heads(self.depth_hidden(x, depth), depth), (x, depth + 1)

    def score_depths(self, state, num_depths):
        x, _ = state
        return self.lm_heads.all_depths([self.depth_hidden(x, k) for k in range(num_depths)])


@dataclass
class MedusaConfig(LMHeadOptions):
    """Options of Medusa's networks."""

    num_depths: int = option(5, "tokens drafted after the root, one network each")
    num_layers: int = option(1, "residual blocks per depth, each with its own weights")


class MedusaHead(ParallelHead):
    """logits_k = W_k (x + SiLU(A_k x + b_k)), with x the last hidden state after the final norm (arXiv 2401.10774,
    section 2.1).

    A_k is initially zero and W_k the backbone's language-model head, so an untrained depth repeats the backbone's
    next-token guess. ``heads.layers.DepthLMHeads`` lists what else W_k can be.
    """

    def __init__(self, config: MedusaConfig, backbone):
        super().__init__(config, backbone)
        at_least(config, num_layers=1)
        self.blocks = jt.nn.ModuleList(
            [
                jt.nn.Sequential(*[ResidualBlock(self.dim) for _ in range(config.num_layers)])
                for _ in range(config.num_depths)
            ]
        )
        self.lm_heads = DepthLMHeads(config.lm_head, config.rank, config.num_depths, backbone, self.lm_logits)

    def depth_hidden(self, x, depth):
        return self.blocks[depth](x)
