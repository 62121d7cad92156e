"""Frozen weights as the CUDA products read them: tiles of 16 outputs, inputs rounded up to 64 (``cuda/linear.h``).

A lane of a warp loads 16 bytes at a time, which hold its part of the first factor of ``mma.m16n8k16``. Matrices are
packed some outputs at a time into arrays allocated once: there are never two packed copies of a large one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ops.kernel import launch
from ops.packing.quantize import GROUP, QUANTIZERS
from runtime import jt

TILE, STEP, ROW_BLOCK = 16, 64, 8
WARPS, BLOCKS, MOST_SLICES, LEAST_STEPS = 8, 264, 16, 4
OUTPUTS_AT_ONCE = 1024  # a multiple of a tile
assert GROUP == STEP
# Tiles of 16 inputs in a lane's 16 bytes.
_TOGETHER = {"float16": 1, "int8": 2, "uint8": 4}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def num_slices(num_out: int, num_in: int) -> int:
    """The number of slices of a product's sums, as ``slices_of`` in C++ counts them."""
    across = -(-num_out // (TILE * WARPS))
    return max(1, min(BLOCKS // across, MOST_SLICES, -(-num_in // STEP) // LEAST_STEPS))


def input_bytes(dtype: str, rows: int, num_in: int) -> int:
    """Bytes of ``rows`` rows packed for weights of a dtype: float32 for float32, halves for all others."""
    return _round_up(rows, ROW_BLOCK) * _round_up(num_in, STEP) * (4 if dtype == "float32" else 2)


def packed_sizes(dtype: str, num_out: int, num_in: int) -> tuple[int, int]:
    """(elements, scales) of a packed matrix. dtype: uint8 is NF4, two codes an element."""
    outputs, steps = _round_up(num_out, TILE), -(-num_in // STEP)
    size = outputs * steps * STEP // (2 if dtype == "uint8" else 1)
    return size, {"int8": outputs, "uint8": outputs * steps}.get(dtype, 0)


def pack_tiles(weight: np.ndarray) -> np.ndarray:
    """(out, in) -> (size,) of the same dtype; uint8 is NF4 codes, which come two a byte.

    float32: (tiles, inputs / 4, 16 outputs, 4 inputs). Others: (tiles, inputs / 16 / n, lane, n, 8), n = 1 for float16,
    2 for int8 and 4 for NF4, whose lower half byte comes first. The 8 weights of lane l in 16 inputs, g = l / 4 and
    t = l % 4, as (output, input): (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1), then the same of inputs
    2 t + 8 and 2 t + 9.
    """
    num_out, num_in = weight.shape
    outputs, inputs = _round_up(num_out, TILE), _round_up(num_in, STEP)
    if (outputs, inputs) != weight.shape:
        padded = np.zeros((outputs, inputs), weight.dtype)
        padded[:num_out, :num_in] = weight
        weight = padded
    if weight.dtype == np.float32:
        return weight.reshape(-1, TILE, inputs // 4, 4).transpose(0, 2, 1, 3).reshape(-1)
    together = _TOGETHER[weight.dtype.name]
    # (tiles, upper half, g, inputs / 16 / n, n, inputs + 8, t, inputs + 1)
    parts = weight.reshape(-1, 2, 8, inputs // TILE // together, together, 2, 4, 2)
    lanes = parts.transpose(0, 3, 2, 6, 4, 5, 1, 7).reshape(-1)
    return lanes[0::2] | lanes[1::2] << 4 if weight.dtype == np.uint8 else lanes


def pack_on_device(weight):
    """``pack_tiles`` of a Var (out, in) float32, at once and on the device; CUDA only."""
    num_out, num_in = weight.shape
    packed = launch(
        (packed_sizes("float32", num_out, num_in)[0],),
        "float32",
        [weight],
        cpu='#error "for CUDA alone"',
        cuda="gorgon::pack_weight(in0_p, in0_shape0, in0_shape1, out0_p);",
        cuda_files=["linear.h", "pack.h"],
    ).stop_grad()
    packed.sync()
    return packed


def pack_tile_scales(scale: np.ndarray) -> np.ndarray:
    """int8: (out, 1) float32 -> (tiles, 16). NF4: (out, groups) float16 -> (tiles, groups, 8, 2), outputs g and g + 8
    adjacent. Flat."""
    num_out, groups = scale.shape
    padded = np.zeros((_round_up(num_out, TILE), groups), scale.dtype)
    padded[:num_out] = scale
    if scale.dtype == np.float32:
        return padded.reshape(-1)
    return padded.reshape(-1, 2, 8, groups).transpose(0, 3, 2, 1).reshape(-1)


def row_blocks(matrices: list[np.ndarray], size: int = OUTPUTS_AT_ONCE) -> Iterator[np.ndarray]:
    """The rows of several matrices in order, ``size`` at a time; the last block holds the rest."""
    held: list[np.ndarray] = []
    for matrix in matrices:
        first = 0
        while first < len(matrix):
            end = min(len(matrix), first + size - sum(map(len, held)))
            held.append(matrix[first:end])
            first = end
            if sum(map(len, held)) == size:
                yield np.concatenate(held) if len(held) > 1 else held[0]
                held = []
    if held:
        yield np.concatenate(held)


class Room:
    """Flat arrays for several matrices of one dtype and for their scales. shapes: [(out, in), ...]."""

    def __init__(self, dtype: str, shapes: Iterable[tuple[int, int]]):
        sizes = np.array([packed_sizes(dtype, *shape) for shape in shapes]).sum(0)
        self.packed = np.empty(sizes[0], dtype)
        self.scales = np.empty(sizes[1], np.float16 if dtype == "uint8" else np.float32) if sizes[1] else None
        self._end = self._scales_end = 0

    def append(self, weight: np.ndarray, scale: np.ndarray | None = None) -> None:
        """The next outputs of a matrix: a multiple of 16, or its last ones."""
        tiles = pack_tiles(weight)
        self.packed[self._end : self._end + tiles.size] = tiles
        self._end += tiles.size
        if scale is not None:
            tiles = pack_tile_scales(scale)
            self.scales[self._scales_end : self._scales_end + tiles.size] = tiles
            self._scales_end += tiles.size

    def variables(self):
        """(packed, scales or None) as Vars, once everything has been appended."""
        assert self._end == self.packed.size, (self._end, self.packed.size)
        return tuple(None if each is None else jt.array(each).stop_grad() for each in (self.packed, self.scales))


def pack_matrices(matrices: list[list[np.ndarray]], storage: str | None):
    """Packs several matrices into one array, each given as a list of parts (out, in) to be stacked.

    storage: a name of ``QUANTIZERS`` to round them, else they keep their dtype. Returns (packed, scales).
    """
    dtype = {"int8": "int8", "nf4": "uint8"}.get(storage, matrices[0][0].dtype.name)
    room = Room(dtype, [(sum(len(part) for part in parts), parts[0].shape[1]) for parts in matrices])
    for parts in matrices:
        for rows in row_blocks(parts):
            room.append(*(QUANTIZERS[storage](rows) if storage in QUANTIZERS else (rows,)))
    return room.variables()
