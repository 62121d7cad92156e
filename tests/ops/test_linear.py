"""Packed products equal NumPy's within rounding, and a row's result does not depend on its neighbours."""

import numpy as np
import pytest

from ops.linear import (
    LANES,
    PackedLinear,
    pack,
    pack_gated,
    reference_linear,
)
from ops.quantize import QUANTIZERS, dequantize
from runtime import jt

# (rows, in, out): sizes around the tiles of 6 rows and 16 outputs; 300 outputs reach the eight-block path of one row.
SIZES = [(1, 1, 1), (1, 37, 300), (2, 16, 16), (5, 37, 33), (6, 100, 150), (7, 64, 15), (13, 33, 272), (64, 96, 100)]


def random_case(rows, num_in, num_out, dtype, seed=0):
    random = np.random.default_rng([seed, rows, num_in, num_out])
    x = random.standard_normal((rows, num_in)).astype(np.float32)
    return x, random.standard_normal((num_out, num_in)).astype(dtype)


def run(weight, x):
    return PackedLinear(weight)(jt.array(x)).numpy()


def packed_as(weight, dtype):
    """A PackedLinear of the weight in float16, float32, int8 or nf4."""
    return PackedLinear(*QUANTIZERS[dtype](weight)) if dtype in QUANTIZERS else PackedLinear(weight.astype(dtype))


def rounding_bound(x, weight):
    """A sum of K products in float32, one rounding each, errs by at most K 2^-24 sum |x w| (Higham, 2002, eq. 3.5)."""
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    return x.shape[1] * 2.0**-24 * magnitude + 1e-30


def exact(x, weight):
    return x.astype(np.float64) @ weight.astype(np.float64).T


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_product_equals_numpy_within_rounding(size, dtype):
    x, weight = random_case(*size, dtype)
    assert (np.abs(run(weight, x) - exact(x, weight)) <= rounding_bound(x, weight)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_rounding_bound_notices_two_swapped_inputs_and_a_rounded_weight(dtype):
    x, weight = random_case(6, 100, 150, dtype)
    swapped = weight.copy()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    assert (np.abs(run(swapped, x) - exact(x, weight)) > rounding_bound(x, weight)).any()
    if dtype == "float32":
        rounded = weight.astype(np.float16)
        assert (np.abs(run(rounded, x) - exact(x, weight)) > rounding_bound(x, weight)).any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_reference_equals_the_kernel_within_rounding(dtype):
    x, weight = random_case(5, 37, 33, dtype)
    reference = reference_linear(jt.array(x), jt.array(weight)).numpy()
    assert (np.abs(reference - run(weight, x)) <= 2 * rounding_bound(x, weight)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "nf4"])
def test_a_row_is_bitwise_the_same_whatever_rows_run_beside_it(dtype):
    x, weight = random_case(64, 96, 292, "float32")
    linear = packed_as(weight, dtype)
    together = linear(jt.array(x)).numpy()
    for count in range(1, 65):
        first = (count * 7) % (65 - count)  # another stretch of the rows each time
        alone = linear(jt.array(x[first : first + count])).numpy()
        np.testing.assert_array_equal(alone, together[first : first + count], err_msg=f"{count} rows from {first}")


def test_bitwise_equality_notices_another_order_of_summation():
    x, weight = random_case(64, 96, 100, "float32")
    backwards = np.zeros((64, 100), np.float32)
    for k in reversed(range(96)):
        backwards += x[:, k : k + 1] * weight[:, k]
    kernel = run(weight, x)
    assert (backwards != kernel).any()
    assert (np.abs(backwards - kernel) <= 2 * rounding_bound(x, weight)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_quantized_product_equals_that_of_the_rounded_weights(size, storage):
    x, weight = random_case(*size, "float32")
    rounded, scale = QUANTIZERS[storage](weight)
    kept = dequantize(rounded, scale)
    result = PackedLinear(rounded, scale)(jt.array(x)).numpy()
    # one more rounding, that of the scale's product
    assert (np.abs(result - exact(x, kept)) <= 2 * rounding_bound(x, kept)).all()
    assert size[1] < 30 or (np.abs(result - exact(x, weight)) > 2 * rounding_bound(x, kept)).any()


def test_nf4_codes_lie_two_a_byte_in_the_order_the_kernel_wants():
    assert pack(np.arange(16, dtype=np.uint8)[:, None]).tobytes().hex(" ") == "20 64 a8 ec 31 75 b9 fd"
    codes = np.random.default_rng(0).integers(0, 16, (40, 5)).astype(np.uint8)
    packed = pack(codes)
    assert packed.shape == (3, 5, LANES // 2) and packed.dtype == np.uint8
    for out, k in np.ndindex(40, 5):
        block, lane = divmod(out, LANES)
        byte = packed[block, k, lane % 2 * 4 + lane // 4]
        assert byte >> (lane // 2 % 2 * 4) & 15 == codes[out, k]


@pytest.mark.parametrize("size", [(40, 200), (5, 64), (16, 1)])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_the_kernel_computes_with_the_rounded_weights_bit_for_bit(storage, size):
    rounded, scale = QUANTIZERS[storage](np.random.default_rng(1).standard_normal(size).astype(np.float32))
    ones = jt.array(np.eye(size[1], dtype=np.float32))
    np.testing.assert_array_equal(PackedLinear(rounded, scale)(ones).numpy().T, dequantize(rounded, scale))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_weights_without_scales_are_refused(dtype):
    with pytest.raises(AssertionError, match="scales"):
        PackedLinear(np.ones((3, 4), dtype))


def test_packing_puts_the_outputs_of_a_block_beside_each_other():
    weight = np.arange(3 * 2, dtype=np.float32).reshape(3, 2) + 1
    packed = pack(weight)
    assert packed.shape == (1, 2, LANES)
    np.testing.assert_array_equal(packed[0, :, :3], weight.T)
    assert not packed[0, :, 3:].any()
    weight = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    np.testing.assert_array_equal(pack(weight).transpose(0, 2, 1).reshape(-1, 5)[:40], weight)


def test_gated_packing_alternates_the_blocks_of_gate_and_up():
    gate, up = np.random.default_rng(1).standard_normal((2, 20, 3)).astype(np.float32)
    packed = pack_gated(gate, up)
    np.testing.assert_array_equal(packed[0::2], pack(gate))
    np.testing.assert_array_equal(packed[1::2], pack(up))
    scales = np.arange(20, dtype=np.float32)[:, None] + 1
    np.testing.assert_array_equal(
        pack_gated(scales, -scales)[:, 0, :3], [[1, 2, 3], [-1, -2, -3], [17, 18, 19], [-17, -18, -19]]
    )


def test_an_input_of_another_width_is_refused():
    with pytest.raises(AssertionError, match=r"2, ?5"):
        PackedLinear(np.ones((3, 4), np.float32))(jt.array(np.ones((2, 5), np.float32)))
