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
    padded = np.zeros((blocks * LANES, num_in), weight.dtype)
    padded[:num_out] = weight
    return np.ascontiguousarray(padded.reshape(blocks, LANES, num_in).transpose(0, 2, 1))


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Pack two (inner, in) matrices with their blocks alternating: gate, up, gate, up, ..."""
    packed_gate, packed_up = pack(gate), pack(up)
    return np.ascontiguousarray(np.stack([packed_gate, packed_up], 1).reshape(-1, *packed_gate.shape[1:]))


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
    """A frozen linear map without bias: weight (out, in) float16 or float32, arithmetic in float32.

    A row's result is bitwise the same whatever rows run beside it.
    """

    def __init__(self, weight: np.ndarray):
        self.num_out, self.num_in = weight.shape
        self.packed = jt.array(pack(weight) if on_cpu() else weight).stop_grad()

    def __call__(self, x):
        """x: (rows, in) float32 -> (rows, out) float32."""
        if not on_cpu():
            return reference_linear(x, self.packed)
        assert x.ndim == 2 and x.shape[1] == self.num_in, (x.shape, self.num_in)
        return jt.code(
            (x.shape[0], self.num_out),
            "float32",
            [x, self.packed],
            cpu_header=cpu_header(),
            cpu_src="gorgon::linear(in0_p, in0_shape0, in0_shape1, gorgon::raw(in1_p), out0_shape1, out0_p);",
        )
