"""A call of each operation that has a CUDA body, in the types and head widths that compile different kernels."""

from __future__ import annotations

import numpy as np

from ops.attention import attention, rotary
from ops.cache_rows import keep_rows, write_rows
from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.linear_loss import linear_cross_entropy
from ops.machine import copy, fma_gflop_s, launch_us, multiply_halves, read
from ops.optimizer import adamw, exchange, lion, move_average, muon, squared_norm
from ops.row_plan import RowPlan
from ops.select import argmax, top_k, top_k_log_probabilities
from ops.training import cross_entropy, kl_divergence
from runtime import jt
from tests.ops.layers import rotary as rotary_tables

STORAGES = ["float16", "float32", "int8", "nf4"]
PLAN = [-1, 0, 0]  # a root with two children


def floats(*shape):
    return jt.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def ints(*numbers):
    return jt.array(np.array(numbers, np.int32))


def run_pass(storage, head_dim):
    shape = LayerShape(32, 2, 1, head_dim, 48, 1e-5)
    cache_dtype = "float32" if storage == "float32" else "float16"
    padded = -(-head_dim // 16) * 16
    lm_head = PackedLinear.random(40, 32, "float32" if storage == "float32" else "float16")
    embedding = floats(40, 32).cast(cache_dtype)
    decoder = Decoder([LayerWeights.random(shape, storage)] * 2, embedding, jt.ones((32,)), lm_head)
    cache = jt.zeros((2, 2, 1, 16, padded), dtype=cache_dtype)
    cache.sync()
    tables = rotary_tables(head_dim, 16)
    made = decoder_pass(decoder, ints(1, 2, 3), RowPlan(np.array(PLAN)), *tables, cache, 2, (1,), 3)
    jt.sync([made.hidden, made.logits, made.chosen], True)
    keep_rows(cache, np.array([4], np.int32), np.array([3], np.int32))


def unpack_matrix():
    LayerWeights.random(LayerShape(32, 2, 1, 16, 48, 1e-5)).frozen()["k"].float32().sync()


def attend(head_dim, own):
    factors = [floats(3, 2, head_dim), floats(3, 1, head_dim), floats(3, 1, head_dim)]
    factors += [floats(3, 1, 1, head_dim), floats(3, 1, 1, head_dim)] if own else []
    q, k, v, *owns = factors
    y = attention(q, k, v, np.array([0, 0, 2], np.int32), np.array([1, 2, 1], np.int32), *owns)
    return jt.grad(y.sqr().sum(), factors)


def turn():
    x = floats(3, 2, 8)
    return jt.grad(rotary(x, *(table[:3] for table in rotary_tables(8, 4))).sqr().sum(), x)


def write():
    cache = jt.zeros((8, 4))
    cache.sync()
    write_rows(cache, floats(2, 4), 3)


def lose(soft):
    hidden, weight = floats(6, 8), floats(20, 8)
    teacher = (jt.zeros((6, 2), dtype="int32"), jt.ones((6, 2)) / 2) if soft else None
    total, _, _ = linear_cross_entropy(
        [(hidden, weight)], ints(1, 2, 3, 4, -1, 5), jt.ones((6,)), teacher, 0.5 if soft else 0.0
    )
    return jt.grad(total, [hidden, weight])


def classify():
    logits = floats(4, 20)
    return jt.grad(cross_entropy(logits, ints(1, -1, 3, 19))[0].sum(), logits)


def diverge():
    logits = floats(4, 20)
    return jt.grad(kl_divergence(logits, floats(4, 20) * 2).sum(), logits)


def optimize():
    weight, grad, mean, square = (floats(4, 6) + i for i in range(4))
    jt.sync([weight, grad, mean, square])
    step = {"rate": 0.1, "weight_decay": 0.01, "scale": 1.0}
    adamw(weight, grad, mean, square, beta1=0.9, beta2=0.99, eps=1e-8, step=1, **step)
    lion(weight, grad, mean, beta1=0.9, beta2=0.99, **step)
    muon(weight, grad, mean, beta=0.9, **step)
    move_average(weight, mean, 0.9)
    exchange(weight, mean)
    squared_norm([grad, mean])


def measure():
    buffer = jt.ones((4096,))
    buffer.sync()
    read(buffer, 2)
    copy(buffer)
    fma_gflop_s(2)
    multiply_halves(1.0, 2)
    launch_us(2, 2)


CALLS = [
    lambda: top_k(floats(2, 20), 3),
    lambda: top_k_log_probabilities(floats(2, 20), 3),
    lambda: argmax(floats(2, 20)),
    *[lambda s=s: PackedLinear.random(10, 24, s)(floats(3, 24)) for s in STORAGES],
    *[lambda s=s: PackedLinear.random(10, 24, s).float32() for s in STORAGES],
    lambda: PackedLinear.of(floats(10, 24)).packed,
    *[lambda s=s: run_pass(s, 16) for s in STORAGES],
    lambda: run_pass("float16", 64),
    lambda: run_pass("float16", 128),
    unpack_matrix,
    *[lambda d=d, own=own: attend(d, own) for d in (64, 128) for own in (False, True)],
    turn,
    write,
    lambda: lose(False),
    lambda: lose(True),
    classify,
    diverge,
    optimize,
    measure,
]
