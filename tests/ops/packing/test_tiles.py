"""Packed weights are where an mma's fragments expect them, and packing makes one copy."""

import tracemalloc

import numpy as np
import pytest

from ops.packing.quantize import GROUP, quantize_nf4, quantize_rows
from ops.packing.tiles import pack_matrices, pack_tile_scales, pack_tiles, packed_sizes, row_blocks

# Tiles of 16 inputs in a lane's 16 bytes.
TOGETHER = {"float16": 1, "int8": 2, "uint8": 4}


def draw(num_out, num_in, dtype):
    random = np.random.default_rng([num_out, num_in])
    if dtype in TOGETHER and dtype != "float16":
        return random.integers(0, 16 if dtype == "uint8" else 127, (num_out, num_in)).astype(dtype)
    return random.standard_normal((num_out, num_in)).astype(dtype)


def fragments():
    """(lane, register, half) -> (row, column) of the first factor of mma.m16n8k16, as the PTX ISA's table has it."""
    for lane in range(32):
        for item in range(8):
            row = lane // 4 + (0 if item in (0, 1, 4, 5) else 8)
            yield lane, item // 2, item % 2, row, lane % 4 * 2 + item % 2 + (8 if item >= 4 else 0)


@pytest.mark.parametrize("size", [(16, 64), (40, 200), (5, 10)])
@pytest.mark.parametrize("dtype", TOGETHER)
def test_a_lane_finds_the_fragments_it_multiplies_with(dtype, size):
    weight, together = draw(*size, dtype), TOGETHER[dtype]
    outputs, inputs = -(-size[0] // 16) * 16, -(-size[1] // 64) * 64
    padded = np.zeros((outputs, inputs), dtype)
    padded[: size[0], : size[1]] = weight
    packed = pack_tiles(weight)
    assert packed.dtype == dtype and packed.shape == (packed_sizes(dtype, *size)[0],)
    if dtype == "uint8":
        packed = np.stack([packed & 15, packed >> 4], 1)
    lanes = packed.reshape(outputs // 16, inputs // 16 // together, 32, together, 4, 2)
    for tile, column in np.ndindex(outputs // 16, inputs // 16):
        for lane, register, half, row, k in fragments():
            found = lanes[tile, column // together, lane, column % together, register, half]
            assert found == padded[16 * tile + row, 16 * column + k]


def test_float32_is_packed_as_sixteen_outputs_of_four_inputs():
    weight = draw(20, 70, "float32")
    packed = pack_tiles(weight).reshape(2, 32, 16, 4)
    for n, k in np.ndindex(20, 70):
        assert packed[n // 16, k // 4, n % 16, k % 4] == weight[n, k]
    assert not packed[1, :, 4:].any() and not packed[:, 18:].any()


def test_scales_are_packed_in_the_order_of_the_lanes():
    scale = quantize_rows(draw(20, 70, "float32"))[1]
    np.testing.assert_array_equal(pack_tile_scales(scale)[:20], scale[:, 0])
    scale = quantize_nf4(draw(20, 2 * GROUP + 5, "float32"))[1]
    packed = pack_tile_scales(scale).reshape(2, 3, 8, 2)
    assert packed.dtype == np.float16
    for n, group in np.ndindex(20, 3):
        assert packed[n // 16, group, n % 8, n % 16 // 8] == scale[n, group]


@pytest.mark.parametrize("size", [3, 4, 100])
def test_row_blocks_are_the_rows_of_consecutive_matrices(size):
    matrices = [np.arange(10 * n, 10 * n + rows)[:, None] for n, rows in enumerate([2, 5, 1, 4])]
    found = list(row_blocks(matrices, size))
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(matrices))
    assert {len(each) for each in found[:-1]} <= {size} and 0 < len(found[-1]) <= size


@pytest.mark.parametrize("storage", [None, "int8", "nf4"])
def test_matrices_in_parts_are_packed_as_one_and_one_after_another(storage):
    q, k, o = draw(1030, 70, "float32"), draw(9, 70, "float32"), draw(24, 10, "float32")
    packed, scales = pack_matrices([[q, k], [o]], storage)
    first, first_scales = pack_matrices([[np.concatenate([q, k])]], storage)
    second, second_scales = pack_matrices([[o]], storage)
    np.testing.assert_array_equal(packed.numpy(), np.concatenate([first.numpy(), second.numpy()]))
    if storage is None:
        assert scales is None
        np.testing.assert_array_equal(first.numpy(), pack_tiles(np.concatenate([q, k])))
    else:
        np.testing.assert_array_equal(scales.numpy(), np.concatenate([first_scales.numpy(), second_scales.numpy()]))


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_large_matrix_is_packed_into_one_copy(storage):
    weight = np.ones((16384, 512), np.float16)
    size = weight.nbytes if storage is None else weight.nbytes // 4 + weight.nbytes // 64

    def peak(pack):
        tracemalloc.start()
        pack()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    beside = 30 * 2**20 // 2  # what a stretch of 1024 outputs takes while it is rounded
    assert peak(lambda: pack_matrices([[weight]], storage)) < size + (beside if storage else weight.nbytes // 4)
    assert peak(lambda: np.concatenate([pack_tiles(weight)[:8], pack_tiles(weight)])) > 2 * weight.nbytes  # the control
