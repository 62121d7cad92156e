"""Greedy and top-k selection without a full sort."""

from __future__ import annotations

from ops.kernel import launch


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


def top_k_log_probabilities(logits, k: int):
    """The k most probable per row, as ``top_k`` orders them. logits: (rows, width) float32.

    Returns their log softmax, (rows, k) float32, at most 0, and indices (rows, k) int32.
    """
    assert 1 <= k <= logits.shape[1], (k, logits.shape)
    return _select("top_k_log", logits, k)


def argmax(logits):
    """Index of the largest per row, the first of equals. (rows, width) float32 -> (rows,) int32."""
    return top_k(logits, 1)[1].reshape(-1)
