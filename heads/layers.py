"""Building blocks that heads share."""

from __future__ import annotations

import numpy as np

from ops.linear import PackedLinear
from ops.training import trainable_linear
from runtime import jt


class Linear(jt.Module):
    """y = x W^T + b with float32 weights (out, in).

    While training it multiplies with gradients; in evaluation with the row-invariant kernel, whose packed copy of
    the weight is made on first use and dropped when training goes on.
    """

    def __init__(self, num_in: int, num_out: int, bias: bool = True, weight: np.ndarray | None = None):
        super().__init__()
        if weight is None:
            # Uniform within 1 / sqrt(in), so that outputs have about a third of the inputs' variance.
            weight = (np.random.rand(num_out, num_in) * 2 - 1) / np.sqrt(num_in)
        assert weight.shape == (num_out, num_in), (weight.shape, num_out, num_in)
        self.weight = jt.array(np.asarray(weight, np.float32))
        if bias:
            self.bias = jt.zeros((num_out,))
        self.has_bias = bias
        self._packed = None

    def execute(self, x):
        """x: (rows, in) float32 -> (rows, out) float32."""
        if self.is_training():
            self._packed = None
            y = trainable_linear(x, self.weight)
        else:
            if self._packed is None:
                self._packed = PackedLinear(self.weight.numpy())
            y = self._packed(x)
        return y + self.bias if self.has_bias else y


class ResidualBlock(jt.Module):
    """x + SiLU(A x + b), zero at the start so that the block begins as the identity (Medusa, arXiv 2401.10774)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, dim, weight=np.zeros((dim, dim)))

    def execute(self, x):
        """x: (rows, dim) -> (rows, dim)."""
        y = self.linear(x)
        return x + y * y.sigmoid()


class RMSNorm(jt.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = jt.ones((dim,))
        self.eps = eps

    def execute(self, x):
        """x: (rows, dim) -> (rows, dim)."""
        return x * jt.rsqrt(x.sqr().mean(-1, keepdims=True) + self.eps) * self.weight
