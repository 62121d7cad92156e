"""Greedy and top-k selection without a full sort."""

from __future__ import annotations

from ops.kernel import launch
from runtime import jt


def reference_top_k(logits, k: int):
    """The k largest per row by repeated argmax. logits: (rows, width) -> values, indices (rows, k)."""
    values, indices = [], []
    columns = jt.arange(logits.shape[1]).unsqueeze(0)
    for _ in range(k):
        index, value = jt.argmax(logits, 1)
        values.append(value)
        indices.append(index)
        logits = jt.where(columns == index.unsqueeze(1), jt.full_like(logits, -3e38), logits)
    return jt.stack(values, 1), jt.stack(indices, 1)


def top_k(logits, k: int):
    """The k largest per row, largest first, ties by index. logits: (rows, width) float32.

    Returns values (rows, k) float32 and indices (rows, k) int32.
    """
    assert 1 <= k <= logits.shape[1], (k, logits.shape)
    return _select("top_k", logits, k)


def _select(function: str, logits, k: int):
    """Values and indices, (rows, k) each, as a function of the kernels gives them."""
    rows = logits.shape[0]
    call = f"gorgon::{function}(in0_p, in0_shape0, in0_shape1, out0_shape1, out0_p, out1_p);"
    shapes, dtypes = [(rows, k), (rows, k)], ["float32", "int32"]
    return launch(shapes, dtypes, [logits], cpu=call, cuda=call, cuda_files=["select.h"])


def reference_top_k_log_probabilities(logits, k: int):
    """log softmax of the k largest per row, and their indices. logits: (rows, width) -> (rows, k) each."""
    values, indices = reference_top_k(logits, k)
    highest = values[:, :1]
    log_sum = (logits - highest).exp().sum(1, keepdims=True).log() + highest
    return jt.minimum(values - log_sum, jt.zeros_like(values)), indices


def top_k_log_probabilities(logits, k: int):
    """The k most probable per row, as ``top_k`` orders them. logits: (rows, width) float32.

    Returns their log softmax, (rows, k) float32, at most 0, and indices (rows, k) int32.
    """
    assert 1 <= k <= logits.shape[1], (k, logits.shape)
    return _select("top_k_log", logits, k)


def argmax(logits):
    """Index of the largest per row, the first of equals. (rows, width) float32 -> (rows,) int32."""
    return top_k(logits, 1)[1].reshape(-1)
