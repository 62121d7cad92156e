"""Linear maps of a few rows, with weights packed so that 16 outputs share a vector register."""

from __future__ import annotations

import numpy as np

from ops.kernel import cpu_header, on_cpu
from runtime import jt

LANES = 16


def pack(weight: np.ndarray) -> np.ndarray:
    """Reorder (out, in) to (blocks of 16 outputs, in, 16); the last block is filled up with zeros.

    Worked example with 2 lanes instead of 16: [[a, b], [c, d], [e, f]] -> [[[a, c], [b, d]], [[e, 0], [f, 0]]].
    """
    num_out, num_in = weight.shape
    blocks = -(-num_out // LANES)
    padded = weight
    if num_out % LANES:
        padded = np.zeros((blocks * LANES, num_in), weight.dtype)
        padded[:num_out] = weight
    return np.ascontiguousarray(padded.reshape(blocks, LANES, num_in).transpose(0, 2, 1))


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Pack two (inner, in) matrices with their blocks alternating: gate, up, gate, up, ..."""
    packed_gate, packed_up = pack(gate), pack(up)
    return np.ascontiguousarray(np.stack([packed_gate, packed_up], 1).reshape(-1, *packed_gate.shape[1:]))


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each row to 8 bits: weight (out, in) -> (int8 (out, in), scale (out,) float32), weight ~ int8 * scale.

    Symmetric, the row's largest magnitude at 127 (absmax quantisation; the row-wise part of LLM.int8(), arXiv
    2208.07339, without its outlier columns). Worked example: [[0.5, -2.0]] -> [[32, -127]], [2 / 127].
    """
    weight = weight.astype(np.float32)
    scale = np.abs(weight).max(1) / 127
    scale[scale == 0] = 1
    return np.rint(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def pack_scales(scale: np.ndarray) -> np.ndarray:
    """(out,) -> the same for whole blocks of 16, filled up with zeros."""
    padded = np.zeros(-(-len(scale) // LANES) * LANES, np.float32)
    padded[: len(scale)] = scale
    return padded


def pack_gated_scales(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The scales of ``pack_gated``: blocks of 16 alternating."""
    return np.stack([pack_scales(gate).reshape(-1, LANES), pack_scales(up).reshape(-1, LANES)], 1).reshape(-1)


def unpack(packed: np.ndarray, num_out: int) -> np.ndarray:
    """The (out, in) matrix that ``pack`` was given."""
    blocks, num_in, lanes = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(blocks * lanes, num_in)[:num_out])


def unpack_gated(packed: np.ndarray, num_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The two (out, in) matrices that ``pack_gated`` was given."""
    alternating = packed.reshape(-1, 2, *packed.shape[1:])
    return unpack(alternating[:, 0], num_out), unpack(alternating[:, 1], num_out)


def reference_linear(x, weight):
    """y = x W^T. x: (rows, in) float32; weight: (out, in); y: (rows, out) float32."""
    return jt.matmul(x, weight.float32().transpose(1, 0))


class PackedLinear:
    """A frozen linear map without bias: weight (out, in) in float16, float32, or int8 with a scale (out,) per output;
    arithmetic in float32.

    A row's result is bitwise the same whatever rows run beside it.
    """

    def __init__(self, weight: np.ndarray, scale: np.ndarray | None = None):
        assert (weight.dtype == np.int8) == (scale is not None), "int8 weights come with scales, others without"
        self.num_out, self.num_in = weight.shape
        if not on_cpu() and scale is not None:
            weight, scale = weight * scale[:, None], None
        if on_cpu():
            weight = pack(weight)  # the one that came is let go
        self.packed = jt.array(weight).stop_grad()
        self.scale = None if scale is None else jt.array(pack_scales(scale)).stop_grad()

    def __call__(self, x):
        """x: (rows, in) float32 -> (rows, out) float32."""
        if not on_cpu():
            return reference_linear(x, self.packed)
        assert x.ndim == 2 and x.shape[1] == self.num_in, (x.shape, self.num_in)
        scales, scale_p = ([], "nullptr") if self.scale is None else ([self.scale], "in2_p")
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
