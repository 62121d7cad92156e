"""One random layer, packed for the kernels and plain for the reference, and a pass through it alone."""

from types import SimpleNamespace

import numpy as np

from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from runtime import jt


def make_layer(s: LayerShape, dtype: str):
    """(packed weights, plain (out, in) weights) of one random layer, for the bodies that serve now."""
    random = np.random.default_rng(0)
    sizes = {
        "q": (s.num_heads * s.head_dim, s.hidden_size),
        "k": (s.num_kv_heads * s.head_dim, s.hidden_size),
        "v": (s.num_kv_heads * s.head_dim, s.hidden_size),
        "o": (s.hidden_size, s.num_heads * s.head_dim),
        "gate": (s.intermediate_size, s.hidden_size),
        "up": (s.intermediate_size, s.hidden_size),
        "down": (s.hidden_size, s.intermediate_size),
    }
    parts = {n: (random.standard_normal(size) * 1.5 / np.sqrt(size[1])).astype(dtype) for n, size in sizes.items()}
    norms = {n: random.uniform(0.5, 1.5, s.hidden_size).astype(np.float32) for n in ("norm1", "norm2")}
    plain = SimpleNamespace(
        shape=s,
        qkv=jt.array(np.concatenate([parts[n] for n in "qkv"])),
        o=jt.array(parts["o"]),
        gate_up=jt.array(np.concatenate([parts["gate"], parts["up"]])),
        down=jt.array(parts["down"]),
        **{n: jt.array(v) for n, v in norms.items()},
    )
    return LayerWeights(s, **norms, **parts), plain


def rotary(head_dim: int, positions: int):
    """cos and sin of position * frequency, (positions, head_dim / 2) float32."""
    half = head_dim // 2
    angles = np.arange(positions, dtype=np.float32)[:, None] * 100.0 ** (-np.arange(half, dtype=np.float32) / half)
    return jt.array(np.cos(angles)), jt.array(np.sin(angles))


def decoder_layer(x, weights, plan, cosine, sine, cache, base):
    """The output of one layer for the states ``x`` (rows, dim) float32: a pass over them as embeddings."""
    rows, dim = x.shape
    head = PackedLinear(np.zeros((rows, dim), np.float32))  # its outputs are the vocabulary, one token a row
    decoder = Decoder([weights], x, jt.ones((dim,)), head)
    return decoder_pass(decoder, jt.arange(rows), plan, cosine, sine, cache, base, wanted=(1,)).taken[0]
