"""The backbone's forward pass with gradients, for training that changes it; without a cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from backbone.model import Backbone
from ops.attention import attention, rotary
from ops.layer_weights import FrozenMatrix
from runtime import einops, jt
from runtime.types import Var

Linear = Callable[[int, str, Var, FrozenMatrix], Var]
SPLIT_HEADS = "rows (heads d) -> rows heads d"


def frozen_linear(layer: int, name: str, x, weight: FrozenMatrix):
    """y = x W^T; the gradient reaches x alone. x: (rows, in), weight: (out, in) -> (rows, out)."""
    return weight(x)


def _rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467). x: (rows, dim) float32."""
    return x * jt.rsqrt(x.sqr().mean(-1, keepdims=True) + eps) * weight


class DifferentiableBackbone:
    """The same equations as ``Backbone.forward``, with gradients, over the same weights in 16, 8 or 4 bits.

    It holds no copy of the weights: every product unpacks its matrix, in the pass and again for the gradient (QLoRA,
    arXiv 2305.14314, section 3).
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.matrices = [block.frozen() for block in backbone.blocks]

    def hidden(self, token_ids: np.ndarray, lengths: np.ndarray, linear: Linear = frozen_linear):
        """Last hidden states after the final norm, (tokens, dim) float32.

        token_ids: (tokens,) int32, sequences of these lengths end to end. linear(layer, name, x, weight) -> y
        computes each projection, so that adapters can add to it.
        """
        b, c, lengths = self.backbone, self.backbone.config, np.asarray(lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = np.arange(len(starts)) - starts
        first, count = starts.astype(np.int32), (positions + 1).astype(np.int32)
        cosine, sine = b.rotary_tables(int(positions.max()) + 1)
        index = jt.array(positions.astype(np.int32))
        tables = cosine[index], sine[index]
        x = b.embed(jt.array(np.asarray(token_ids, np.int32)))
        for layer, (block, weights) in enumerate(zip(b.blocks, self.matrices, strict=True)):

            def project(name, x, layer=layer, weights=weights):
                return linear(layer, name, x, weights[name])

            u = _rms_norm(x, block.norm1, c.rms_norm_eps)
            q, k, v = (einops.rearrange(project(name, u), SPLIT_HEADS, d=c.head_dim) for name in "qkv")
            y = attention(rotary(q, *tables), rotary(k, *tables), v, first, count)
            x = x + project("o", einops.rearrange(y, "rows heads d -> rows (heads d)"))
            u = _rms_norm(x, block.norm2, c.rms_norm_eps)
            gate = project("gate", u)
            x = x + project("down", gate * gate.sigmoid() * project("up", u))
        return _rms_norm(x, b.norm, c.rms_norm_eps)
