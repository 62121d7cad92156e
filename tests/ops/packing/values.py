"""The values of quantized weights, in NumPy: what the kernels' products are held to."""

import numpy as np

from ops.packing.quantize import GROUP, NF4


def dequantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(out, in) float32: the values of int8 or NF4 codes (uint8), exactly as the CPU's kernels compute them.

    The CUDA kernels differ in NF4, whose 16 values are rounded to float16 there."""
    if weight.dtype == np.int8:
        return weight * scale
    return NF4[weight] * np.repeat(scale.astype(np.float32), GROUP, 1)[:, : weight.shape[1]]
