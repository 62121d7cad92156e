"""A backbone of random weights that are made on the device: the host never holds them."""

from __future__ import annotations

from backbone.config import BackboneConfig
from backbone.model import Backbone
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.packing.random import random_values
from runtime import jt


class RandomBackbone(Backbone):
    """A backbone to time: what a pass costs does not depend on the weights. Its fingerprint names the seed; it has no
    file."""

    def __init__(self, config: BackboneConfig, dtype: str, seed: int = 0):
        self.config, self.dtype, self.storage = config, dtype, dtype
        self.path, self.fingerprint = None, f"random {seed}"
        c, std = config, config.hidden_size**-0.5  # keeps hidden states near one
        shape = LayerShape(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, c.rms_norm_eps)
        size = c.vocab_size * c.hidden_size
        # Uniform values between the bounds have a standard deviation of the bound over the root of 3.
        self.embedding = random_values(size, dtype, seed, 3**0.5).reshape(c.vocab_size, c.hidden_size).stop_grad()
        self.norm = jt.ones((c.hidden_size,)).stop_grad()
        self.lm_head = PackedLinear.random(c.vocab_size, c.hidden_size, dtype, seed + 1, std)
        self.blocks = [LayerWeights.random(shape, dtype, seed + 2 + layer, std) for layer in range(c.num_layers)]
        jt.sync([self.embedding, self.norm, self.lm_head.packed, *[block.packed for block in self.blocks]], True)
        self._begin_rotary()
