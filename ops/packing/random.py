"""Random packed matrices, for measurements at sizes whose weights need not exist."""

from __future__ import annotations

import numpy as np

from ops.kernel import launch, on_cpu
from ops.packing import lanes, tiles
from ops.packing.quantize import NF4
from runtime import jt


def random_matrices(shapes: list[tuple[int, int]], storage: str, seed: int, std: float):
    """(packed, scales or None) of concatenated random matrices, as ``PackedLinear`` and a layer hold them.

    shapes: [(out, in), ...]. storage: float16, float32, int8 or nf4. Weights are uniform, those of NF4 in their codes.
    """
    dtype = {"nf4": "uint8"}.get(storage, storage)
    layout = lanes if on_cpu() else tiles
    sizes = np.array([layout.packed_sizes(dtype, *shape) for shape in shapes]).sum(0)
    packed = random_values(int(sizes[0]), dtype, seed, std * 3**0.5)
    if not sizes[1]:
        return packed, None
    deviation = 254 / 12**0.5 if dtype == "int8" else float(NF4.std())
    scales = jt.full((int(sizes[1]),), std / deviation, "float32" if dtype == "int8" else "float16")
    return packed, scales.stop_grad()


def random_values(count: int, dtype: str, seed: int, bound: float = 0.0):
    """(count,) Var, on a GPU never in the host's memory: weights for measurements. Floats are uniform in +-bound, int8
    in -127 .. 127, uint8 in 0 .. 255. The seed determines the values."""
    if on_cpu():
        random = np.random.default_rng(seed)
        if dtype in ("int8", "uint8"):
            values = random.integers(-127 if dtype == "int8" else 0, 128 if dtype == "int8" else 256, count, dtype)
        else:
            values = random.uniform(-bound, bound, count)
        return jt.array(values.astype(dtype)).stop_grad()
    return launch(
        (count,),
        dtype,
        [],
        cpu="",
        cuda='gorgon::fill_random(gorgon::raw(out0_p), out0->num, (uint64_t)data["seed"], (float)data["bound"]);',
        cuda_files=["random.h"],
        data={"seed": seed, "bound": bound},
    ).stop_grad()
