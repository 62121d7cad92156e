"""A parallel head with a mixture of experts that all depths share; each depth has its own router."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from heads.base import HeadOutput, at_least, option
from heads.layers import DepthLMHeads, Linear, LMHeadOptions
from heads.medusa import ParallelHead
from runtime import einops, jt
from runtime.types import Var


@dataclass
class Config(LMHeadOptions):
    """Options of the mixture-of-experts head."""

    num_depths: int = option(5, "tokens drafted after the root, a router and a language-model head each")
    num_experts: int = option(4, "experts, shared by all depths")
    top_k: int = option(2, "experts per row")
    inner_size: int = option(128, "width of an expert")
    balance_weight: float = option(0.01, "weight of the load-balancing loss")


class MoEHead(ParallelHead):
    """p = softmax(R_k x);  g_i = p_i / sum of p over the top k, exactly 0 for the experts outside it
    y_k = x + sum_i g_i B_i SiLU(A_i x + b_{k,i});  logits_k = W_k y_k

    x: the last hidden state; A_i, B_i: an expert, shared by all depths; R_k, b_k: the depth's router and its bias in
    the experts. B_i is initially zero and W_k the backbone's language-model head, so an untrained depth repeats the
    backbone's next-token guess. With top_k = 1, g is p itself (arXiv 2101.03961, eq. 2): renormalized it would be 1,
    and the router would get no gradient from the guesses.

    All experts are computed and weighted: a row is one product for all of them, and to select the top k the host would
    have to wait for the router.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, num_experts=2, inner_size=1, balance_weight=0)
        if not 1 <= config.top_k <= config.num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts ({config.num_experts}), got {config.top_k}")
        width = config.num_experts * config.inner_size
        self.router = Linear(self.dim, config.num_depths * config.num_experts, bias=False)
        self.expert_in = Linear(self.dim, width, bias=False)
        self.depth_bias = jt.zeros((config.num_depths, width))
        self.expert_out = Linear(width, self.dim, bias=False, weight=np.zeros((self.dim, width)))
        self.lm_heads = DepthLMHeads(config.lm_head, config.rank, config.num_depths, backbone, self.lm_logits)

    def route(self, x: Var) -> tuple[Var, Var, Var]:
        """The routing of all depths. x: (rows, dim) -> (p, chosen, g), (rows, depths, experts) each; chosen is 0 or
        1."""
        config = self.config
        scores = einops.rearrange(
            self.router(x), "rows (depths experts) -> rows depths experts", depths=config.num_depths
        )
        p = jt.nn.softmax(scores, -1)
        # An expert is chosen when fewer than top_k rank before it: those with a higher p, and earlier ones with an
        # equal p.
        mine, other = p.unsqueeze(3), p.unsqueeze(2)
        earlier = jt.array(np.tri(config.num_experts, k=-1, dtype=np.float32))  # [i, j] = 1 where j < i
        before = ((other > mine).float32() + (other == mine).float32() * earlier).sum(3)
        chosen = (before < config.top_k).float32().stop_grad()
        gates = p * chosen
        return p, chosen, gates / gates.sum(2, keepdims=True) if config.top_k > 1 else gates

    def mix(self, x: Var, depths: Iterable[int], gates: Var) -> list[Var]:
        """The y of these depths. x: (rows, dim), gates: (rows, num_depths, experts) -> one (rows, dim) per depth."""
        a, rows, ys = self.expert_in(x), x.shape[0], []
        for depth in depths:
            z = a + self.depth_bias[depth]
            z = (z * z.sigmoid()).reshape(rows, self.config.num_experts, -1) * gates[:, depth].unsqueeze(2)
            ys.append(x + self.expert_out(z.reshape(rows, -1)))
        return ys

    def balance_loss(self, p: Var, chosen: Var) -> Var:
        """Mean over the depths of N sum_i f_i P_i (arXiv 2101.03961, eq. 4 to 6), 1 when all experts are used alike.
        f_i: the share of expert i among all choices, top_k a row; P_i: its mean probability."""
        share = chosen.mean(0) / self.config.top_k
        return (share * p.mean(0)).sum() * (self.config.num_experts / self.num_depths)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        x = self.select(features.hidden, positions)
        p, chosen, gates = self.route(x)
        ys = self.mix(x, range(self.num_depths), gates)
        logits = [self.lm_heads.project(y, depth) for depth, y in enumerate(ys)]
        aux = {"load_balance": self.balance_loss(p, chosen) * self.config.balance_weight}
        # The host waits for it, so only where it is reported.
        stats = {} if self.is_training() else {"expert_usage": chosen.numpy() / self.config.top_k}
        return HeadOutput(logits, aux, stats)

    def depth_hidden(self, x, depth):
        return self.mix(x, [depth], self.route(x)[2])[0]

    def score_depths(self, state, num_depths):
        x, _ = state
        return self.lm_heads.all_depths(self.mix(x, range(num_depths), self.route(x)[2]))
