"""Trainable attention: rows over a range of shared keys and over a few keys of their own, with gradients.

    y = softmax(q [K, K_own]^T / sqrt(d)) [V, V_own]

A row of a packed batch sees its conversation up to itself, a range of the keys; while a head drafts, it also sees the
tokens drafted before, which no other row may see. Written in plain Jittor it takes twenty to thirty times as long.
The rotary embedding of such a layer is here as well.
"""

from __future__ import annotations

import math

import numpy as np

from ops.kernel import launch, on_cpu
from runtime import jt

LANES = 16  # floats in a vector: the kernels take head widths that are a multiple of it
WIDEST_CUDA = 256  # of a head: what the registers of a thread hold
GRAD_QUERIES = 32  # of ops/kernels/cuda/train_attention_grad.h

# The sizes that the kernels read, and a check of the ranges: they may be Vars that nothing has checked before.
SIZES = """
gorgon::Attention a{in0_shape0, in0_shape1, in1_shape1, in0_shape2, in1_shape0, %s, (float)data["scale"]};
CHECK(gorgon::ranges_fit(a, in3_p, in4_p)) << "attention: first and count must name keys that there are";
"""
CUDA_SIZES = """
int heads = in0_shape1, kv_heads = in1_shape1;
gorgon::AttentionShape a{(int)in0_shape0, heads, kv_heads, heads / kv_heads, (int)in0_shape2, (int)in1_shape0, (int)%s,
                         (float)data["scale"]};
"""


def _cuda_width(q) -> int:
    """The width that the CUDA kernels are compiled for. q: (rows, heads, d)."""
    return -(-q.shape[2] // 32) * 32


class _Attention(jt.Function):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def execute(self, q, k, v, first, count, *own):
        rows, heads, _ = q.shape
        own_pointers = "in5_p, in6_p" if own else "nullptr, nullptr"
        num_own = "in5_shape1" if own else "0"
        call = f"in0_p, in1_p, in2_p, in3_p, in4_p, {own_pointers}, out0_p, out1_p);"
        y, log_sum = launch(
            [tuple(q.shape), (rows, heads)],
            ["float32", "float32"],
            [q, k, v, first, count, *own],
            cpu=SIZES % num_own + f"gorgon::attention_forward(a, {call}",
            cuda=CUDA_SIZES % num_own + f"gorgon::attention_forward<{_cuda_width(q)}>(a, {call}",
            cpu_files=["cpu_attention.h"],
            cuda_files=["train_attention.h"],
            data={"scale": self.scale},
        )
        self.saved = q, k, v, first, count, y, log_sum, *own
        return y

    def grad(self, upstream):
        q, k, v, first, count, y, log_sum, *own = self.saved
        own_pointers, own_grads = ("in8_p, in9_p", "out3_p, out4_p") if own else ["nullptr, nullptr"] * 2
        num_own = "in8_shape1" if own else "0"
        num = 3 + len(own)
        queries = q.shape[0] * q.shape[1] // k.shape[1]
        scratch = [] if on_cpu() else [tuple(log_sum.shape), (-(-queries // GRAD_QUERIES), 2)]
        call = f"in0_p, in1_p, in2_p, in3_p, in4_p, in5_p, in6_p, in7_p, {own_pointers}"
        call += f", {{out0_p, out1_p, out2_p, {own_grads}}}"
        grads = launch(
            [tuple(x.shape) for x in (q, k, v, *own)] + scratch,
            ["float32"] * num + ["float32", "int32"][: len(scratch)],
            [q, k, v, first, count, y, log_sum, upstream, *own],
            cpu=SIZES % num_own + f"gorgon::attention_backward(a, {call});",
            cuda=CUDA_SIZES % num_own
            + f"gorgon::attention_backward<{_cuda_width(q)}>(a, {call}, out{num}_p, out{num + 1}_p);",
            cpu_files=["cpu_attention.h", "cpu_attention_grad.h"],
            cuda_files=["train_attention.h", "train_attention_grad.h"],
            data={"scale": self.scale},
        )
        return *grads[:3], None, None, *grads[3:num]


def _check_ranges(first, count, rows: int, tokens: int, own: int) -> None:
    """Shapes and types always, values where they are NumPy arrays."""
    assert tuple(first.shape) == tuple(count.shape) == (rows,), (first.shape, count.shape, rows)
    assert str(first.dtype) == str(count.dtype) == "int32", (first.dtype, count.dtype)
    if isinstance(first, np.ndarray) and isinstance(count, np.ndarray):
        assert (first >= 0).all() and (count >= 0).all(), (first.min(), count.min())
        assert (first.astype(np.int64) + count <= tokens).all(), ((first.astype(np.int64) + count).max(), tokens)
        assert own or (count > 0).all(), f"row {int(count.argmin())} sees no key"


def attention(q, k, v, first, count, own_k=None, own_v=None):
    """Softmax attention of rows over a range of shared keys and over keys of the row's own.

    q: (rows, heads, d) float32; k, v: (tokens, kv_heads, d) float32, a cache may have unused rows; first, count:
    (rows,) int32, NumPy arrays or Vars: row r sees the keys first[r] .. first[r] + count[r] - 1, at least one where it
    has none of its own; own_k, own_v: (rows, own, kv_heads, d) float32: further keys that only this row sees, or None.
    Query head h reads key-value head h // (heads // kv_heads) (arXiv 2305.13245). Scores are scaled by 1 / sqrt(d).
    Returns (rows, heads, d) float32, with gradients to q, k, v, own_k and own_v; a key that no row sees gets zero.

    Ranges may overlap and come in any order. It is fast where rows that share ``first`` are adjacent and d is a
    multiple of 16 (otherwise everything is copied into wider heads first). Four tokens, causal in conversations of
    three and one: first [0, 0, 0, 3], count [1, 2, 3, 1].

    A range outside the keys raises AssertionError where it can be read at once, RuntimeError from the kernel otherwise.
    On a GPU the kernel traps: the next wait for results raises, and the process cannot use the GPU any more. There d is
    at most 256.
    """
    (rows, heads, d), (tokens, kv_heads, _) = q.shape, k.shape
    own = 0 if own_k is None else own_k.shape[1]
    assert rows > 0 and heads % kv_heads == 0, (q.shape, k.shape)
    assert tuple(k.shape) == tuple(v.shape) == (tokens, kv_heads, d), (q.shape, k.shape, v.shape)
    assert (own_k is None) == (own_v is None), "own_k and own_v go together"
    _check_ranges(first, count, rows, tokens, own)
    owns = []
    if own:
        assert tuple(own_k.shape) == tuple(own_v.shape) == (rows, own, kv_heads, d), (own_k.shape, own_v.shape)
        owns = [own_k, own_v]
    assert on_cpu() or d <= WIDEST_CUDA, f"heads of {d}: the CUDA kernels take at most {WIDEST_CUDA}"
    first, count = (jt.array(x) if isinstance(x, np.ndarray) else x for x in (first, count))
    scale = 1 / math.sqrt(d)
    missing = -d % LANES
    if missing == 0:
        return _Attention(scale)(q, k, v, first, count, *owns)
    q, k, v, *owns = (jt.concat([x, jt.zeros((*x.shape[:-1], missing))], -1) for x in (q, k, v, *owns))
    return _Attention(scale)(q, k, v, first, count, *owns)[:, :, :d]


class _Rotary(jt.Function):
    def execute(self, x, cosine, sine):
        self.saved = cosine, sine
        return self.turn(x, 1)

    def grad(self, upstream):
        return self.turn(upstream, -1), None, None

    def turn(self, x, direction: int):
        call = """
        gorgon::rotary(in0_p, in0_shape0, in0_shape1, in0_shape2, in1_p, in2_p, (float)data["direction"], out0_p);
        """
        return launch(
            tuple(x.shape),
            "float32",
            [x, *self.saved],
            cpu=call,
            cuda=call,
            cpu_files=["cpu_rotary.h"],
            cuda_files=["rotary.h"],
            data={"direction": direction},
        )


def rotary(x, cosine, sine):
    """Rotary embedding, half-split layout (arXiv 2104.09864), with the gradient to x: the turn back.

    x: (rows, heads, d) float32, d even; cosine, sine: (rows, d / 2) float32, which get no gradient.
    """
    rows, _, d = x.shape
    assert d % 2 == 0 and tuple(cosine.shape) == tuple(sine.shape) == (rows, d // 2), (x.shape, cosine.shape)
    return _Rotary()(x, cosine.stop_grad(), sine.stop_grad())
