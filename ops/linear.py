"""Linear maps of a few rows, with weights packed so that 16 outputs share a vector register."""

from __future__ import annotations

import numpy as np

from ops.kernel import cpu_header, on_cpu
from ops.quantize import dequantize
from runtime import jt

LANES = 16


def pack(weight: np.ndarray) -> np.ndarray:
    """Reorder (out, in) to (blocks of 16 outputs, in, 16); the last block is filled up with zeros.

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


def reference_linear(x, weight):
    """y = x W^T. x: (rows, in) float32; weight: (out, in); y: (rows, out) float32."""
    return jt.matmul(x, weight.float32().transpose(1, 0))


class PackedLinear:
    """A frozen linear map without bias: weight (out, in) in float16, float32, or what ``ops.quantize`` makes of one,
    int8 or NF4 codes with their scales; arithmetic in float32.

    A row's result is bitwise the same whatever rows run beside it.
    """

    def __init__(self, weight: np.ndarray, scale: np.ndarray | None = None):
        quantized = weight.dtype in (np.int8, np.uint8)
        assert quantized == (scale is not None), "quantized weights come with scales, others without"
        self.num_out, self.num_in = weight.shape
        if not on_cpu() and quantized:
            weight, scale = dequantize(weight, scale), None
        if on_cpu():
            weight = pack(weight)  # the one that came is let go
        self.packed = jt.array(weight).stop_grad()
        self.scale = None if scale is None else jt.array(pack(scale)).stop_grad()

    def __call__(self, x):
        """x: (rows, in) float32 -> (rows, out) float32."""
        if not on_cpu():
            return reference_linear(x, self.packed)
        assert x.ndim == 2 and x.shape[1] == self.num_in, (x.shape, self.num_in)
        scales, scale_p = ([], "nullptr") if self.scale is None else ([self.scale], "gorgon::raw(in2_p)")
        return jt.code(
            (x.shape[0], self.num_out),
            "float32",
            [x, self.packed, *scales],
            cpu_header=cpu_header(),
            cpu_src=f"""
            auto* w = gorgon::raw(in1_p);
            gorgon::Matrix<std::remove_const_t<std::remove_reference_t<decltype(*w)>>> m{{w, {scale_p}}};
            gorgon::linear(in0_p, in0_shape0, in0_shape1, m, out0_shape1, out0_p);
            """,
        )
