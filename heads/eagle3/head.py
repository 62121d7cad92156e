"""EAGLE-3 (arXiv 2503.01840): low, middle and high features fused; no feature loss; trained on its own drafts."""

from __future__ import annotations

from dataclasses import dataclass

from heads.base import option
from heads.decoder import DecoderBlock, LayerHead
from heads.draft_vocab import DraftVocabulary
from heads.fused_layers import fused_layers
from heads.layers import Linear, RMSNorm
from runtime import einops, jt


@dataclass
class Config:
    """Options of the EAGLE-3 head."""

    num_depths: int = option(6, "tokens drafted after the root, and depths that training unrolls")
    token_residual: bool = option(False, "the layer's residual stream starts from the token too, not from g alone")
    draft_vocab_size: int = option(0, "tokens it can draft: the most frequent of the training replies; 0: all")


class Eagle3Head(DraftVocabulary, LayerHead):
    """g_t = W_f [l_t; m_t; h_t];  y_t = layer(residual g_t, attention over [n_e(e_{t+1}); n_g(g_t)])
    logits_0 = W_lm n(y_t);  depth k >= 1 reads y of depth k - 1 in the place of g

    l, m, h: the hidden states of a low, a middle and a high layer of the backbone; e: token embeddings; W_lm: its own
    language-model head over the draft vocabulary, initially the backbone's rows. With ``token_residual`` the residual
    is g_t + W_r [n_e(e_{t+1}); n_g(g_t)].
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if not 0 <= config.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size must be from 0 to {self.vocab_size}, got {config.draft_vocab_size}")
        self.fused = fused_layers(backbone.config.num_layers)
        self.layers = tuple(dict.fromkeys(self.fused))
        eps = backbone.config.rms_norm_eps
        self.fuse = Linear(3 * self.dim, self.dim, bias=False)
        self.token_norm, self.feature_norm, self.norm = (RMSNorm(self.dim, eps) for _ in range(3))
        self.block = DecoderBlock(backbone, 2 * self.dim)
        if config.token_residual:
            self.residual = Linear(2 * self.dim, self.dim, bias=False)
        self.begin_with_first_tokens()
        size = config.draft_vocab_size or self.vocab_size
        self.lm_head = Linear(self.dim, size, bias=False, weight=backbone.lm_head_weight[:size])

    def prepare(self, token_counts):
        if self.choose_tokens(token_counts):
            self.lm_head.weight.update(self.borrowed.lm_head_weight[self.drafted].detach())
            self.lm_head.weight.sync()

    def context(self, features):
        parts = [features.layers[index] for index in self.fused]
        return self.fuse(einops.rearrange(jt.concat(parts, 2), "batch seq dim -> (batch seq) dim"))

    def pair(self, feature, token_ids):
        u = jt.concat([self.token_norm(self.embed(token_ids)), self.feature_norm(feature)], 1)
        return feature + self.residual(u) if self.config.token_residual else feature, u

    def logits(self, y):
        return self.lm_head(self.norm(y))

    def project(self, y):
        return self.lm_head.project(self.norm(y))
