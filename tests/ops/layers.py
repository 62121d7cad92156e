"""Random numbers, one random layer, packed for the kernels and plain for the reference, and a pass through it."""

from types import SimpleNamespace

import numpy as np

from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.packing.quantize import GROUP, NF4, QUANTIZERS
from runtime import jt
from tests.ops.packing.values import dequantize


def normal(*shape, seed=0):
    """Standard normal numbers of this shape, float32, the same at each call."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stored(weight, storage: str, body: str):
    """The (out, in) float32 weights that a body computes with, in this storage."""
    if storage not in QUANTIZERS:
        return weight.astype(storage).astype(np.float32)
    codes, scale = QUANTIZERS[storage](weight)
    if storage == "nf4" and body == "cuda":  # its values are halves there
        return NF4.astype(np.float16)[codes] * np.repeat(scale.astype(np.float32), GROUP, 1)[:, : weight.shape[1]]
    return dequantize(codes, scale)


def make_layer(s: LayerShape, dtype: str, storage: str | None = None, random=None, scale: float = 1.5):
    """(packed weights, plain (out, in) weights) of one random layer, for the bodies that serve now. The plain ones are
    what the storage keeps, by default the dtype."""
    random = random or np.random.default_rng(0)
    q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    sizes = {"q": (q_width, s.hidden_size), "k": (kv_width, s.hidden_size), "v": (kv_width, s.hidden_size)}
    sizes |= {"o": (s.hidden_size, q_width), "gate": (s.intermediate_size, s.hidden_size)}
    sizes |= {"up": (s.intermediate_size, s.hidden_size), "down": (s.hidden_size, s.intermediate_size)}
    parts = {n: (random.standard_normal(size) * scale / np.sqrt(size[1])).astype(dtype) for n, size in sizes.items()}
    norms = {n: random.uniform(0.5, 1.5, s.hidden_size).astype(np.float32) for n in ("norm1", "norm2")}
    packed = LayerWeights(s, **norms, **parts, storage=storage)
    matrices = packed.matrices()
    plain = SimpleNamespace(
        shape=s,
        qkv=jt.array(np.concatenate([matrices[n] for n in "qkv"])),
        o=jt.array(matrices["o"]),
        gate_up=jt.array(np.concatenate([matrices["gate"], matrices["up"]])),
        down=jt.array(matrices["down"]),
        **{n: jt.array(v) for n, v in norms.items()},
    )
    return packed, plain


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
