"""Rounding to 8 and 4 bits: worked examples, published values, and how far a rounded weight may lie from its own."""

import numpy as np
import pytest

from ops.packing.quantize import GROUP, NF4, quantize_nf4, quantize_rows
from tests.ops.packing.values import dequantize

# QLoRA (arXiv 2305.14314), appendix E, to four digits.
PUBLISHED = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
PUBLISHED += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def draw(num_out, num_in):
    return np.random.default_rng([num_out, num_in]).standard_normal((num_out, num_in)).astype(np.float32)


def test_the_values_of_nf4_are_the_published_ones():
    assert NF4.dtype == np.float32
    np.testing.assert_allclose(NF4, PUBLISHED, rtol=0, atol=1e-4)
    assert (np.diff(NF4) > 0).all() and (NF4[0], NF4[7], NF4[15]) == (-1, 0, 1)


def test_nf4_of_the_worked_example():
    codes, scales = quantize_nf4(np.array([[0.5, -2.0, 0.0, 1.4]]))
    np.testing.assert_array_equal(codes, [[10, 0, 7, 14]])
    np.testing.assert_array_equal(scales, [[2]])
    assert codes.dtype == np.uint8 and scales.dtype == np.float16
    np.testing.assert_allclose(dequantize(codes, scales), [[0.4922, -2, 0, 1.4459]], atol=1e-4)


def test_every_64_inputs_of_a_row_have_their_own_scale_and_the_last_ones_what_is_left():
    weight = draw(5, 2 * GROUP + 36)
    weight[0, :GROUP] *= 100
    weight[1, GROUP : 2 * GROUP] = 0
    codes, scales = quantize_nf4(weight)
    assert codes.shape == weight.shape and scales.shape == (5, 3)
    for group in range(3):
        part = slice(group * GROUP, (group + 1) * GROUP)
        np.testing.assert_array_equal(scales[:, group], np.abs(weight[:, part]).max(1).astype(np.float16))
        alone = quantize_nf4(weight[:, part])
        np.testing.assert_array_equal(codes[:, part], alone[0])
    assert (codes[1, GROUP : 2 * GROUP] == 7).all() and not dequantize(codes, scales)[1, GROUP : 2 * GROUP].any()


@pytest.mark.parametrize("num_in", [1, 64, 100])
def test_each_weight_gets_the_nearest_value(num_in):
    weight = draw(30, num_in)
    codes, scales = quantize_nf4(weight)
    each = np.repeat(scales.astype(np.float32), GROUP, 1)[:, :num_in]
    distances = np.abs(weight[:, :, None] - NF4 * each[:, :, None])
    found = np.abs(dequantize(codes, scales) - weight)
    np.testing.assert_allclose(found, distances.min(2), atol=1e-6)
    # Half of the widest gap, -1 to -0.696, and what float16 takes from the scale.
    assert (found <= 0.1525 * each).all()


def test_a_weight_beyond_float16_is_refused():
    with pytest.raises(ValueError, match=r"a weight of magnitude 70000 exceeds 65504.*; load the backbone in 8 bits"):
        quantize_nf4(np.array([[1.0, -7e4]], np.float32))


def test_rounding_to_8_bits_errs_by_half_a_step_at_most():
    weight = draw(30, 50)
    weight[3] = 0
    rounded, scale = quantize_rows(weight)
    assert rounded.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (30, 1)
    assert (np.abs(rounded).max(1)[np.arange(30) != 3] == 127).all() and not rounded[3].any()
    assert (np.abs(dequantize(rounded, scale) - weight) <= scale * 0.5001).all()
    np.testing.assert_array_equal(quantize_rows(np.array([[0.5, -2.0]]))[0], [[32, -127]])
