"""The CPU kernels' layout of a matrix: 16 outputs side by side, so that they share a vector register."""

from __future__ import annotations

import numpy as np

from ops.packing.quantize import GROUP

LANES = 16


def pack(weight: np.ndarray) -> np.ndarray:
    """Reorder (out, in) to (blocks of 16 outputs, in, 16); the last block is padded with zeros.

    Worked example with 2 lanes instead of 16: [[a, b], [c, d], [e, f]] -> [[[a, c], [b, d]], [[e, 0], [f, 0]]].

    uint8 is NF4 codes, two a byte: (blocks, in, 8). The even outputs of a block are the half bytes of the first four
    bytes, the odd ones those of the others, the lower half first: codes 0 to 15 in order give the bytes 20 64 a8 ec 31
    75 b9 fd. Scales are packed like weights: (out, groups) -> (blocks, groups, 16).
    """
    num_out, num_in = weight.shape
    blocks = -(-num_out // LANES)
    padded = weight
    if num_out % LANES:
        padded = np.zeros((blocks * LANES, num_in), weight.dtype)
        padded[:num_out] = weight
    lanes = padded.reshape(blocks, LANES, num_in).transpose(0, 2, 1)
    if weight.dtype == np.uint8:
        # Output 4 b + 2 h + w is half h of byte b of word w.
        parts = lanes.reshape(blocks, num_in, 4, 2, 2)
        pairs = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
        lanes = pairs.transpose(0, 1, 3, 2).reshape(blocks, num_in, LANES // 2)
    return np.ascontiguousarray(lanes)


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Pack two (inner, in) matrices, or their scales, with their blocks alternating: gate, up, gate, up, ..."""
    packed_gate, packed_up = pack(gate), pack(up)
    return np.ascontiguousarray(np.stack([packed_gate, packed_up], 1).reshape(-1, *packed_gate.shape[1:]))


def packed_sizes(dtype: str, num_out: int, num_in: int) -> tuple[int, int]:
    """How many elements a packed matrix takes, and how many scales."""
    outputs = -(-num_out // LANES) * LANES
    groups = {"int8": 1, "uint8": -(-num_in // GROUP)}.get(dtype, 0)
    return outputs * num_in // (2 if dtype == "uint8" else 1), outputs * groups
