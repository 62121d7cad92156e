"""Frozen matrices in 8 or 4 bits: how weights are rounded and restored."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

GROUP = 64  # inputs that share an NF4 scale, as in QLoRA
LARGEST_SCALE = float(np.finfo(np.float16).max)


def normal_float() -> np.ndarray:
    """(16,) float32, ascending: the values of NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E).

    Quantiles of the normal distribution, evenly spaced in probability on either side of zero: eight steps up to 1 and
    seven down to -1, so that zero has a code of its own. The outermost probability is half a code from the end, the
    mean of 1/30 and 1/32.
    """
    quantile, outermost = NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    up = [quantile(p) for p in np.linspace(0.5, outermost, 9)]
    down = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return (np.array(down + up) / up[-1]).astype(np.float32)


NF4 = normal_float()
_BORDERS = (NF4[1:] + NF4[:-1]) / 2


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each row to 8 bits: weight (out, in) -> (int8 (out, in), scale (out, 1) float32), weight ~ int8 * scale.

    Symmetric, the row's largest magnitude at 127 (absmax quantisation; the row-wise part of LLM.int8(), arXiv
    2208.07339, without its outlier columns). Worked example: [[0.5, -2.0]] -> [[32, -127]], [[2 / 127]].
    """
    weight = weight.astype(np.float32)
    scale = np.abs(weight).max(1, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def quantize_nf4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to 4 bits: weight (out, in) -> (codes (out, in) uint8 below 16, scales (out, groups) float16),
    weight[n, k] ~ NF4[codes[n, k]] * scales[n, k // 64].

    A group is 64 inputs of a row, the last one the rest; its scale is its largest magnitude (QLoRA without double
    quantisation). Packed, 0.53 bytes a weight: half a byte, and two for every 64 weights. Scales of float16 weights are
    exact. Worked example: [[0.5, -2.0, 0.0, 1.4]] -> [[10, 0, 7, 14]], [[2]], which represents
    [[0.4922, -2, 0, 1.4459]]. Raises ValueError for a magnitude beyond float16.
    """
    num_out, num_in = weight.shape
    groups = -(-num_in // GROUP)
    padded = np.zeros((num_out, groups * GROUP), np.float32)
    padded[:, :num_in] = weight
    padded = padded.reshape(num_out, groups, GROUP)
    largest = np.abs(padded).max(2)
    if largest.max() > LARGEST_SCALE:
        raise ValueError(
            f"a weight of magnitude {largest.max():g} exceeds {LARGEST_SCALE:g}, the largest scale of 4 bits; "
            "load the backbone in 8 bits or in its dtype"
        )
    scales = largest.astype(np.float16)
    padded /= np.where(scales == 0, 1, scales).astype(np.float32)[:, :, None]
    codes = np.zeros(padded.shape, np.uint8)
    for border in _BORDERS:
        codes += padded > border
    return codes.reshape(num_out, -1)[:, :num_in], scales


# Storage types besides float16 and float32: by name, the rounding and the bits.
QUANTIZERS = {"int8": quantize_rows, "nf4": quantize_nf4}
BITS = {"int8": 8, "nf4": 4}
