"""The figures of ``bench/kernels.py``: kernels and a backbone pass.

Every figure is a median over repeats in milliseconds, after a warm-up of the same shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import runtime
from backbone.model import load_backbone
from bench.clock.timing import medians_ms
from ops.attention import attention
from ops.linear import PackedLinear
from ops.row_plan import RowPlan
from ops.training import cross_entropy, outer_product, trainable_linear
from runtime import jt

ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFIX = 200  # rows in the cache before the pass that is timed


def measure(repeats: int) -> dict[str, Any]:
    """The record of all figures, JSON-ready."""
    fewer = max(5, repeats // 5)
    return {
        "schema_version": 1,
        "kind": "kernels",
        "provenance": runtime.provenance(),
        "backbone_pass_ms": pass_times(repeats),
        "product_4096x256_ms": product_times(repeats, 4096, 256),
        "product_4096x4096_ms": product_times(fewer, 4096, 4096),
        "training_1024x256x4096_ms": training_times(fewer, 1024, 256, 4096),
        "attention_1024x4x64_ms": attention_times(fewer, 4, 64, 6),
    }


def pass_times(repeats: int) -> dict[str, float]:
    """A pass of the embedded backbone over these rows after a prefix, logits of all rows included."""
    backbone = load_backbone()
    ids = np.random.default_rng(0).integers(3, backbone.config.vocab_size, (1, PREFIX)).astype(np.int32)
    cache = backbone.new_cache(backbone.config.max_positions)
    backbone.forward(ids, cache=cache, logits=None).hidden.sync(True)
    cache.commit(np.arange(PREFIX))
    calls = {}
    for rows in ROWS:
        plan, tokens = RowPlan.chain(rows), ids[:, :rows]
        calls[str(rows)] = lambda t=tokens, p=plan: backbone.forward(t, cache=cache, attend=p).logits.sync(True)
    return medians_ms(calls, repeats)


def product_times(repeats: int, num_out: int, num_in: int) -> dict[str, float]:
    """The packed float16 product (num_out, num_in), by rows."""
    rng = np.random.default_rng(0)
    linear = PackedLinear(rng.standard_normal((num_out, num_in)).astype(np.float16))
    inputs = {rows: jt.array(rng.standard_normal((rows, num_in)).astype(np.float32)) for rows in ROWS}
    return medians_ms({str(rows): lambda x=x: linear(x).sync(True) for rows, x in inputs.items()}, repeats)


def training_times(repeats: int, rows: int, dim: int, vocab: int) -> dict[str, float]:
    """One depth of a head's loss, forward and backward."""
    rng = np.random.default_rng(0)
    x = jt.array(rng.standard_normal((rows, dim)).astype(np.float32))
    weight = jt.array(rng.standard_normal((vocab, dim)).astype(np.float32) * 0.05)
    upstream = jt.array(rng.standard_normal((rows, vocab)).astype(np.float32))
    targets = jt.array(rng.integers(0, vocab, rows).astype(np.int32))

    def step():
        losses, _ = cross_entropy(trainable_linear(x, weight), targets)
        for gradient in jt.grad(losses.sum(), [x, weight]):
            gradient.sync(True)

    calls = {"loss_and_gradients": step, "weight_gradient": lambda: outer_product(upstream, x).sync(True)}
    return medians_ms(calls, repeats)


def attention_times(repeats: int, heads: int, dim: int, own: int) -> dict[str, float]:
    """Attention of every second token of ten packed conversations, forward and backward.

    own: further keys of each row, as after this many drafted tokens.
    """
    lengths = np.array([50, 80, 120, 150, 180, 200, 236, 250, 270, 512])
    num_tokens, plan = int(lengths.sum()), RowPlan.sequences(lengths)
    first, count = (jt.array(plan.meta_array[::2, column].copy()) for column in (2, 3))
    rng = np.random.default_rng(0)
    rows = first.shape[0]
    shapes = [(rows, heads, dim), *[(num_tokens, heads, dim)] * 2, *[(rows, own, heads, dim)] * 2]
    inputs = [jt.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    upstream = jt.array(rng.standard_normal(shapes[0]).astype(np.float32))
    jt.sync_all()

    def step():
        q, k, v, own_k, own_v = inputs
        y = attention(q, k, v, first, count, own_k, own_v)
        jt.sync(jt.grad((y * upstream).sum(), inputs))

    return medians_ms({"attention_and_gradients": step}, repeats)
