"""Linear maps of a few rows, with weights packed so that 16 outputs share a vector register."""

from __future__ import annotations

import numpy as np

from ops.kernel import launch, on_cpu
from ops.packing.lanes import pack
from ops.packing.random import random_matrices
from ops.packing.tiles import Room, input_bytes, num_slices, pack_on_device, row_blocks
from runtime import jt


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
