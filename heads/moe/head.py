"""A parallel head whose block is a mixture of experts: shared by the depths, each with a router of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from heads.base import HeadOutput, option
from heads.layers import DepthLMHeads, Linear, LMHeadOptions
from heads.medusa import ParallelHead
from runtime import jt


@dataclass
class Config(LMHeadOptions):
    """Options of the mixture-of-experts head."""

    num_depths: int = option(5, "tokens drafted after the root, a router and a language-model head each")
    num_experts: int = option(4, "experts, shared by all depths")
    top_k: int = option(2, "experts that work on a row")
    inner_size: int = option(128, "width of an expert")
    balance_weight: float = option(0.01, "weight of the loss that keeps the experts evenly used")


class MoEHead(ParallelHead):
    """p = softmax(R_k x);  g_i = p_i / sum of p over the top k, exactly 0 for the experts outside it
    y_k = x + sum_i g_i B_i SiLU(A_i x + b_{k,i});  logits_k = W_k y_k

    x: the last hidden state; A_i, B_i: an expert, one for all depths; R_k, b_k: the depth's router and its bias in the
    experts. B_i starts at zero and W_k as the backbone's language-model head, so an untrained depth repeats the
    backbone's next-token guess. With top_k = 1, g is p itself (arXiv 2101.03961, eq. 2): renormalised it would be 1,
    and the router would learn nothing from the guesses.

    All experts are computed and weighted: one row is a single product for all of them, and picking the top k would
    make the host wait for the router.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {config.num_experts}")
        if not 1 <= config.top_k <= config.num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts ({config.num_experts}), got {config.top_k}")
        if config.inner_size < 1:
            raise ValueError(f"inner_size must be at least 1, got {config.inner_size}")
        if not 0 <= config.balance_weight < float("inf"):
            raise ValueError(f"balance_weight must be at least 0 and finite, got {config.balance_weight}")
        width = config.num_experts * config.inner_size
        self.router = Linear(self.dim, config.num_depths * config.num_experts, bias=False)
        self.expert_in = Linear(self.dim, width, bias=False)
        self.depth_bias = jt.zeros((config.num_depths, width))
        self.expert_out = Linear(width, self.dim, bias=False, weight=np.zeros((self.dim, width)))
        self.lm_heads = DepthLMHeads(config.lm_head, config.rank, config.num_depths, backbone, self.lm_logits)

    def route(self, x):
        """All depths' routing. x: (rows, dim) -> (p, chosen, g), (rows, depths, experts) each; chosen is 0 or 1."""
        config = self.config
        p = jt.nn.softmax(self.router(x).reshape(-1, config.num_depths, config.num_experts), -1)
        # An expert is chosen when fewer than top_k go before it: those with more, and earlier ones with as much.
        mine, other = p.unsqueeze(3), p.unsqueeze(2)
        earlier = jt.array(np.tri(config.num_experts, k=-1, dtype=np.float32))  # [i, j] = 1 where j < i
        before = ((other > mine).float32() + (other == mine).float32() * earlier).sum(3)
        chosen = (before < config.top_k).float32().stop_grad()
        gates = p * chosen
        return p, chosen, gates / gates.sum(2, keepdims=True) if config.top_k > 1 else gates

    def mix(self, x, depths: Iterable[int], gates) -> list:
        """The y of these depths. x: (rows, dim), gates: (rows, num_depths, experts) -> one (rows, dim) per depth."""
        a, rows, ys = self.expert_in(x), x.shape[0], []
        for depth in depths:
            z = a + self.depth_bias[depth]
            z = (z * z.sigmoid()).reshape(rows, self.config.num_experts, -1) * gates[:, depth].unsqueeze(2)
            ys.append(x + self.expert_out(z.reshape(rows, -1)))
        return ys

    def balance_loss(self, p, chosen):
        """Mean over the depths of N sum_i f_i P_i (arXiv 2101.03961, eq. 4 to 6): f_i is the share of the choices that
        fell on expert i, of top_k choices a row here, P_i its mean probability. 1 when all are used alike."""
        share = chosen.mean(0) / self.config.top_k
        return (share * p.mean(0)).sum() * (self.config.num_experts / self.num_depths)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        x = self.select(features.hidden, positions)
        p, chosen, gates = self.route(x)
        ys = self.mix(x, range(self.num_depths), gates)
        logits = [self.lm_heads.project(y, depth) for depth, y in enumerate(ys)]
        aux = {"load_balance": self.balance_loss(p, chosen) * self.config.balance_weight}
        # Read on the host, so only where it is reported.
        stats = {} if self.is_training() else {"expert_usage": chosen.numpy() / self.config.top_k}
        return HeadOutput(logits, aux, stats)

    def depth_hidden(self, x, depth):
        return self.mix(x, [depth], self.route(x)[2])[0]

    def score_depths(self, state, num_depths):
        x, _ = state
        return self.lm_heads.all_depths(self.mix(x, range(num_depths), self.route(x)[2]))
