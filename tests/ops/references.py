"""The equations of a decoder layer in plain Jittor, operation by operation: what the kernel of a pass is held to."""

import numpy as np

from ops.decoder_pass import Decoder, PassOutput
from ops.select import argmax
from runtime import einops, jt


def reference_rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467). x: (rows, dim) float32."""
    return x * jt.rsqrt(x.sqr().mean(-1, keepdims=True) + eps) * weight


def reference_rope(x, cosine, sine):
    """Rotary embedding (arXiv 2104.09864), half-split layout. x: (rows, heads, d); cosine, sine: (rows, d / 2)."""
    half = x.shape[-1] // 2
    a, b = x[:, :, :half], x[:, :, half:]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return jt.concat([a * cosine - b * sine, b * cosine + a * sine], -1)


def reference_decoder_layer(x, w, plan, cosine, sine, cache, layer: int, base: int):
    """Plain Jittor. Takes weights as (out, in); returns (y (rows, dim), the layer's new cache plane)."""
    s = w.shape
    q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    positions = jt.array(plan.positions + base)
    cosine, sine = cosine[positions], sine[positions]

    def linear(x, weight):
        return jt.nn.matmul_transpose(x, weight.float32())

    qkv = linear(reference_rms_norm(x, w.norm1, s.eps), w.qkv)
    parts = qkv[:, :q_width], qkv[:, q_width : q_width + kv_width], qkv[:, q_width + kv_width :]
    q, k, v = (einops.rearrange(part, "rows (heads d) -> rows heads d", d=s.head_dim) for part in parts)
    q, k = reference_rope(q, cosine, sine), reference_rope(k, cosine, sine)
    slots = jt.array(plan.meta_array[:, 1] + base)
    plane = cache[layer]  # (2, kv_heads, max_length, padded head_dim)
    # Unlike NumPy, Jittor leaves the indexed dimension in its place: (kv_heads, rows, head_dim).
    for half, rows in enumerate((k, v)):
        plane[half, :, slots, : s.head_dim] = einops.rearrange(rows, "rows heads d -> heads rows d").cast(plane.dtype)
    group = s.num_heads // s.num_kv_heads
    keys, values = plane[0, :, :, : s.head_dim].float32(), plane[1, :, :, : s.head_dim].float32()
    seen = jt.array(plan.mask(base, plane.shape[2]).astype(np.float32))
    heads = []
    for h in range(s.num_heads):
        scores = jt.nn.matmul_transpose(q[:, h], keys[h // group]) / s.head_dim**0.5
        heads.append(jt.matmul(jt.nn.softmax(scores * seen - 1e9 * (1 - seen), -1), values[h // group]))
    h = x + linear(jt.concat(heads, -1), w.o)
    gate_up = linear(reference_rms_norm(h, w.norm2, s.eps), w.gate_up)
    gate, up = gate_up[:, : s.intermediate_size], gate_up[:, s.intermediate_size :]
    return h + linear(gate * gate.sigmoid() * up, w.down), plane


def reference_decoder_pass(decoder: Decoder, token_ids, plan, cosine, sine, cache, base: int, wanted, logit_rows: int):
    """Plain Jittor, weights as (out, in). Does not write ``cache``: returns (PassOutput, its new planes)."""
    x = decoder.embedding[token_ids].float32()
    states, planes = [x], []
    shared = cache.shape[0] == 1  # a pass without a cache needs one layer's keys at a time
    for index, layer in enumerate(decoder.layers):
        x, plane = reference_decoder_layer(x, layer, plan, cosine, sine, cache, 0 if shared else index, base)
        states.append(x)
        planes.append(plane)
    eps = decoder.layers[0].shape.eps
    hidden = reference_rms_norm(x, decoder.norm, eps)
    taken = jt.stack([states[i] for i in wanted]) if wanted else None
    if not logit_rows:
        return PassOutput(hidden, taken, None, None), planes
    logits = jt.matmul(hidden[hidden.shape[0] - logit_rows :], decoder.lm_head.packed.float32().transpose(1, 0))
    return PassOutput(hidden, taken, logits, argmax(logits)), planes
