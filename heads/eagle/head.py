"""EAGLE-1 (arXiv 2401.15077): a decoder layer predicts features, the backbone's language-model head reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import HeadOutput, at_least, option
from heads.decoder import DecoderBlock, LayerHead
from heads.layers import Linear, RMSNorm, later_positions, smooth_l1
from runtime import jt


@dataclass
class Config:
    """Options of the EAGLE head."""

    num_depths: int = option(6, "tokens drafted after the root; the weights are shared, so this costs no parameters")
    trained_depths: int = option(6, "depths that training unrolls on the head's own features; 1: as published")
    feature_weight: float = option(0.1, "weight of the feature loss beside the cross-entropy")
    noise: float = option(0.0, "largest uniform noise added to the features while training")
    attention_norm: bool = option(True, "norm what attention reads; false: as published and in EAGLE-1's files")


class EagleHead(LayerHead):
    """x_t = W [e_{t+1}; f_t] + b;  f'_{t+1} = layer(x_t; attention over n(x_0) .. n(x_t));  logits_0 = LM(f'_{t+1})

    f_t: the backbone's last hidden state, e_{t+1}: the embedding of the next token, LM: the backbone's frozen
    language-model head; n: an RMSNorm, or the identity without ``attention_norm``. Depth k >= 1 reads its own f'_{t+k}
    in place of features that the backbone has not computed yet.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, trained_depths=1, feature_weight=0, noise=0)
        self.join = Linear(2 * self.dim, self.dim)
        self.norm = RMSNorm(self.dim, backbone.config.rms_norm_eps) if config.attention_norm else None
        self.block = DecoderBlock(backbone)

    def pair(self, feature, token_ids):
        x = self.join(jt.concat([self.embed(token_ids), feature], 1))
        return x, x if self.norm is None else self.norm(x)

    def logits(self, y):
        return self.lm_logits(y)

    def project(self, y):
        return self.lm_projection(y)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        if not self.is_training():
            return super().execute(features, token_ids, positions)
        lengths, positions, feature = self.sequence_lengths(features), np.asarray(positions), self.context(features)
        noisy = feature
        if self.config.noise:
            noisy = feature + (jt.rand(*feature.shape) * 2 - 1) * self.config.noise
        depths = min(self.config.trained_depths, self.num_depths)
        outputs = self.unroll(noisy, lengths, token_ids, positions, depths)
        loss = 0
        for depth, y in enumerate(outputs):
            later, valid = later_positions(positions, lengths, depth + 1)
            loss = loss + smooth_l1(y, feature[jt.array(later)], valid) / depths
        logits = [self.project(y) for y in outputs] + [None] * (self.num_depths - depths)
        return HeadOutput(logits, {"feature": loss * self.config.feature_weight})
