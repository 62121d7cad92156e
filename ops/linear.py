"""Linear maps of a few rows, with weights packed so that 16 outputs share a vector register."""

from __future__ import annotations

import numpy as np

from ops.kernel import launch, on_cpu
from ops.packing.quantize import GROUP, NF4
from ops.packing.tiles import Room, input_bytes, num_slices, pack_on_device, packed_sizes, random_values, row_blocks
from runtime import jt

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


class PackedLinear:
    """A frozen linear map without bias: weight (out, in) in float16, float32, or quantized by ``ops.packing.quantize``
    to int8 or NF4 codes with their scales. On the CPU all arithmetic is in float32. On CUDA weights other than
    float32 are multiplied with x rounded to float16 (+-65504 at most), NF4's values are rounded to it too, and sums are
    float32.

    A row's result is bitwise the same whatever other rows the call has.
    """

    def __init__(self, weight: np.ndarray, scale: np.ndarray | None = None):
        quantized = weight.dtype in (np.int8, np.uint8)
        assert quantized == (scale is not None), "quantized weights come with scales, others without"
        self.num_out, self.num_in = weight.shape
        if on_cpu():
            weight = pack(weight)  # the unpacked one is dropped
            self.packed = jt.array(weight).stop_grad()
            self.scale = None if scale is None else jt.array(pack(scale)).stop_grad()
            return
        room = Room(weight.dtype.name, [weight.shape])
        for part in zip(*(row_blocks([each]) for each in (weight, scale) if each is not None), strict=True):
            room.append(*part)
        del weight, part  # only the packed copy is left when it is copied to the device
        self.packed, self.scale = room.variables()

    @classmethod
    def of(cls, weight) -> PackedLinear:
        """The map of a Var (out, in) float32 with its present values; later changes do not matter. On a GPU the weight
        stays there."""
        assert weight.ndim == 2 and weight.dtype == "float32", (weight.shape, weight.dtype)
        if on_cpu():
            return cls(weight.numpy())
        self = cls.__new__(cls)
        self.num_out, self.num_in = weight.shape
        with jt.no_grad():
            self.packed, self.scale = pack_on_device(weight), None
        return self

    @classmethod
    def random(cls, num_out: int, num_in: int, storage: str = "float16", seed: int = 0, std: float = 0.02):
        """A map for measurements: random weights of a standard deviation. storage: float16, float32, int8 or nf4. On a
        GPU the host never holds them."""
        self = cls.__new__(cls)
        self.num_out, self.num_in = num_out, num_in
        self.packed, self.scale = random_matrices([(num_out, num_in)], storage, seed, std)
        return self

    @property
    def inputs(self) -> list:
        """The inputs of a kernel that multiplies with it."""
        return [self.packed, *([] if self.scale is None else [self.scale])]

    def __call__(self, x):
        """x: (rows, in) float32 -> (rows, out) float32."""
        assert x.ndim == 2 and x.shape[1] == self.num_in, (x.shape, self.num_in)
        scale = "nullptr" if self.scale is None else "gorgon::raw(in2_p)"
        rows, shapes = x.shape[0], [(x.shape[0], self.num_out)]
        if not on_cpu():
            slices = num_slices(self.num_out, self.num_in)
            shapes.append((input_bytes(str(self.packed.dtype), rows, self.num_in) // 4,))
            shapes.append((slices, rows, self.num_out) if slices > 1 else (1, 1, 1))
        found = launch(
            shapes,
            ["float32"] * len(shapes),
            [x, *self.inputs],
            cpu=f"""
            auto* w = gorgon::raw(in1_p);
            gorgon::Matrix<std::remove_const_t<std::remove_reference_t<decltype(*w)>>> m{{w, {scale}}};
            gorgon::linear(in0_p, in0_shape0, in0_shape1, m, out0_shape1, out0_p);
            """,
            cuda=f"""
            auto* w = gorgon::raw(in1_p);
            gorgon::Matrix<std::remove_const_t<std::remove_reference_t<decltype(*w)>>> m{{
                w, {scale}, out0_shape1, in0_shape1}};
            gorgon::linear(in0_p, in0_shape0, m, out1_p, out2_p, out0_p);
            """,
            cuda_files=["linear.h"],
        )
        return found[0]

    def float32(self):
        """(out, in) float32: exactly the weights that products use."""
        scale = "nullptr" if self.scale is None else "gorgon::raw(in1_p)"
        return launch(
            (self.num_out, self.num_in),
            "float32",
            self.inputs,
            cpu=f"""
            auto* w = gorgon::raw(in0_p);
            gorgon::Matrix<std::remove_const_t<std::remove_reference_t<decltype(*w)>>> m{{w, {scale}}};
            gorgon::unpack(m, out0_shape1, 0, out0_shape0, 0, 1, out0_p);
            """,
            cuda=f"""
            auto* w = gorgon::raw(in0_p);
            gorgon::Matrix<std::remove_const_t<std::remove_reference_t<decltype(*w)>>> m{{
                w, {scale}, out0_shape0, out0_shape1}};
            gorgon::unpack(m, 0, out0_shape0, out0_p);
            """,
            cuda_files=["linear.h"],
        )


def random_matrices(shapes: list[tuple[int, int]], storage: str, seed: int, std: float):
    """(packed, scales or None) of concatenated random matrices, as ``PackedLinear`` and a layer hold them.

    shapes: [(out, in), ...]. storage: float16, float32, int8 or nf4. Weights are uniform, those of NF4 in their codes.
    """
    dtype = {"nf4": "uint8"}.get(storage, storage)
    sizes = np.array([_packed_sizes(dtype, *shape) for shape in shapes]).sum(0)
    packed = random_values(int(sizes[0]), dtype, seed, std * 3**0.5)
    if not sizes[1]:
        return packed, None
    deviation = 254 / 12**0.5 if dtype == "int8" else float(NF4.std())
    scales = jt.full((int(sizes[1]),), std / deviation, "float32" if dtype == "int8" else "float16")
    return packed, scales.stop_grad()


def _packed_sizes(dtype: str, num_out: int, num_in: int) -> tuple[int, int]:
    """How many elements a packed matrix takes, and how many scales, for the bodies that run."""
    if not on_cpu():
        return packed_sizes(dtype, num_out, num_in)
    outputs = -(-num_out // LANES) * LANES
    groups = {"int8": 1, "uint8": -(-num_in // GROUP)}.get(dtype, 0)
    return outputs * num_in // (2 if dtype == "uint8" else 1), outputs * groups
