"""Packed products equal NumPy's within rounding, and a row's result does not depend on its neighbours."""

import numpy as np
import pytest

import runtime
from ops.kernel import emulated_cuda, launch
from ops.linear import PackedLinear
from ops.optimizer import move_average
from ops.packing.lanes import LANES, pack, pack_gated
from ops.packing.quantize import QUANTIZERS
from ops.packing.tiles import input_bytes, num_slices
from runtime import jt
from tests.ops.layers import stored
from tests.ops.packing.values import dequantize

# (rows, in, out): sizes around the tiles of 6 rows and 16 outputs; 300 outputs reach the eight-block path of one row.
SIZES = [(1, 1, 1), (1, 37, 300), (2, 16, 16), (5, 37, 33), (6, 100, 150), (7, 64, 15), (13, 33, 272), (64, 96, 100)]
# What CUDA splits besides: inputs into slices (of 4 and 2), rows beyond 64, chunks of inputs that begin anew.
SIZES += [(1, 24, 10), (9, 1100, 40), (33, 600, 20), (65, 70, 17), (130, 65, 130)]
STORAGES = ["float16", "float32", "int8", "nf4"]


def random_case(rows, num_in, num_out, dtype, seed=0):
    random = np.random.default_rng([seed, rows, num_in, num_out])
    x = random.standard_normal((rows, num_in)).astype(np.float32)
    return x, random.standard_normal((num_out, num_in)).astype(dtype)


def packed_as(weight, dtype):
    """A PackedLinear of the weight in float16, float32, int8 or nf4."""
    return PackedLinear(*QUANTIZERS[dtype](weight)) if dtype in QUANTIZERS else PackedLinear(weight.astype(dtype))


def seen(x, storage, body):
    """The rows a body computes with: tensor cores take them as halves."""
    return x.astype(np.float16).astype(np.float32) if body == "cuda" and storage != "float32" else x


def rounding_bound(x, weight, storage="float32"):
    """A sum of K products in float32, one rounding each, errs by at most K 2^-24 sum |x w| (Higham, 2002, eq. 3.5).

    A scale's product is one more rounding. A tensor core may cut off what it adds, where others round: twice as much,
    and once more for the products that it aligns to the largest of a step.
    """
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    times = (4 if runtime.device == "cuda" else 1) * (2 if storage in QUANTIZERS else 1)
    return times * x.shape[1] * 2.0**-24 * magnitude + 1e-30


def exact(x, weight):
    return x.astype(np.float64) @ weight.astype(np.float64).T


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_product_equals_numpy_within_rounding(size, storage, body):
    x, weight = random_case(*size, "float32")
    x, held = seen(x, storage, body), stored(weight, storage, body)
    result = packed_as(weight, storage)(jt.array(x)).numpy()
    assert (np.abs(result - exact(x, held)) <= rounding_bound(x, held, storage)).all()
    if 30 <= size[1] < 300 and storage in QUANTIZERS:  # the bound would notice weights that were not rounded
        assert (np.abs(result - exact(x, weight)) > rounding_bound(x, held, storage)).any()


@pytest.mark.parametrize("storage", STORAGES)
def test_the_rounding_bound_notices_two_swapped_inputs(storage, body):
    x, weight = random_case(6, 100, 150, "float32")
    x, held = seen(x, storage, body), stored(weight, storage, body)
    swapped = weight.copy()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    result = packed_as(swapped, storage)(jt.array(x)).numpy()
    assert (np.abs(result - exact(x, held)) > rounding_bound(x, held, storage)).any()


SOME_STRETCHES = [((count * 7) % (65 - count), count) for count in range(1, 65)]  # (first row, rows)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("size", "stretches"),
    [
        ((64, 96, 292), SOME_STRETCHES),
        ((139, 600, 20), [(0, 1), (70, 9), (120, 17), (3, 33), (60, 65), (0, 128)]),  # inputs in slices, many rows
    ],
    ids=["1 to 64 rows", "beyond 64 rows"],
)
def test_a_row_is_bitwise_the_same_whatever_rows_run_beside_it(storage, size, stretches, body):
    x, weight = random_case(*size, "float32")
    linear = packed_as(weight, storage)
    together = linear(jt.array(x)).numpy()
    for first, count in stretches:
        alone = linear(jt.array(x[first : first + count])).numpy()
        np.testing.assert_array_equal(alone, together[first : first + count], err_msg=f"{count} rows from {first}")


@pytest.mark.parametrize("storage", STORAGES)
def test_no_barrier_is_missing(storage, monkeypatch):
    x, weight = random_case(33, 1300, 150, "float32")  # several chunks of inputs, two blocks of outputs
    x, held, results = seen(x, storage, "cuda"), stored(weight, storage, "cuda"), []
    for order in ("ascending", "descending"):  # of the threads
        monkeypatch.setenv("GORGON_EMULATOR_ORDER", order)
        with emulated_cuda():
            results.append(packed_as(weight, storage)(jt.array(x)).numpy())
    assert (np.abs(results[0] - exact(x, held)) <= rounding_bound(x, held, storage)).all()
    np.testing.assert_array_equal(*results)


def test_bitwise_equality_notices_another_order_of_summation(body):
    x, weight = random_case(64, 96, 100, "float32")
    backwards = np.zeros((64, 100), np.float32)
    for k in reversed(range(96)):
        backwards += x[:, k : k + 1] * weight[:, k]
    kernel = PackedLinear(weight)(jt.array(x)).numpy()
    assert (backwards != kernel).any()
    assert (np.abs(backwards - kernel) <= 2 * rounding_bound(x, weight)).all()


def test_values_beyond_float16_are_cut_to_its_largest_for_tensor_cores_and_kept_otherwise(body):
    x = np.array([[1e6, -1e6, 65504, 2]], np.float32)
    expected = np.clip(x, -65504, 65504) if body == "cuda" else x
    for dtype, rows in [("float16", expected), ("float32", x)]:
        linear = PackedLinear(np.eye(4, dtype=dtype))
        np.testing.assert_array_equal(linear(jt.array(x)).numpy(), rows, err_msg=dtype)
    with pytest.raises(AssertionError, match=r"1, ?3"):
        linear(jt.array(x[:, :3]))
    with pytest.raises(AssertionError, match="scales"):
        PackedLinear(np.ones((3, 4), np.int8))


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
@pytest.mark.parametrize("storage", STORAGES)
def test_the_kernel_computes_with_the_rounded_weights_bit_for_bit(storage, size, body):
    weight = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    linear, held = packed_as(weight, storage), stored(weight, storage, body)
    identity = jt.array(np.eye(size[1], dtype=np.float32))
    np.testing.assert_array_equal(linear(identity).numpy().T, held)
    np.testing.assert_array_equal(linear.float32().numpy(), held)
    assert storage not in QUANTIZERS or np.abs(held - dequantize(*QUANTIZERS[storage](weight))).max() < 2.0**-12 * 4


def test_the_room_a_product_is_given_is_what_it_counts_itself():
    """``num_slices`` and ``input_bytes`` are written twice, in Python and in C++."""
    if runtime.device == "cuda":
        pytest.skip("a number computed by the host cannot be written into a GPU's memory")
    sizes = [(1, 1), (10, 24), (20, 600), (100, 5000), (4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)]
    sizes += [(32000, 4096), (256, 100000), (128257, 2048)]
    with emulated_cuda():
        counted = launch(
            (len(sizes), 3),
            "float32",
            [jt.array(np.array(sizes, np.int32))],
            cpu="",
            cuda="""
            for (int64_t i = 0; i < in0_shape0; i++) {
                int64_t outputs = in0_p[2 * i], inputs = in0_p[2 * i + 1];
                out0_p[3 * i] = gorgon::num_slices<int8_t>(outputs, inputs);
                out0_p[3 * i + 1] = gorgon::input_bytes<int8_t>(9, inputs);
                out0_p[3 * i + 2] = gorgon::input_bytes<float>(9, inputs);
            }
            """,
            cuda_files=["linear.h"],
        ).numpy()
    expected = [(num_slices(*s), input_bytes("int8", 9, s[1]), input_bytes("float32", 9, s[1])) for s in sizes]
    np.testing.assert_array_equal(counted, expected)
    blocks = [num_slices(*size) * -(-size[0] // 128) for size in sizes[4:9]]
    assert blocks == [256, 192, 172, 256, 250]  # of two for each of 132 multiprocessors


@pytest.mark.parametrize("storage", STORAGES)
def test_random_weights_have_their_deviation_and_follow_from_the_seed(storage, body):
    linear, again, other = (PackedLinear.random(60, 90, storage, seed=seed, std=0.02) for seed in (3, 3, 4))
    weight = linear.float32().numpy()
    assert abs(weight.std() - 0.02) < 0.002 and abs(weight.mean()) < 0.002 and len(np.unique(weight[:, :7])) > 10
    np.testing.assert_array_equal(again.float32().numpy(), weight)
    assert (other.float32().numpy() != weight).any()
    x = random_case(3, 90, 60, "float32")[0]
    assert np.abs(linear(jt.array(x)).numpy() - exact(x, weight)).max() < 2e-3


@pytest.mark.parametrize("size", [(1, 1), (16, 64), (33, 67), (150, 130)])
def test_a_weight_that_is_a_var_is_packed_as_the_same_array_is_and_does_not_follow_it(size, body):
    weight = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    held = jt.array(weight)
    linear, by_host = PackedLinear.of(held), PackedLinear(weight)
    move_average(held, jt.array(2 * weight), 0.0)  # in place
    assert (held.numpy() != weight).all()
    np.testing.assert_array_equal(linear.packed.numpy(), by_host.packed.numpy())
    assert linear.packed.is_stop_grad() and linear.scale is None
    x = random_case(3, size[1], size[0], "float32")[0]
    np.testing.assert_array_equal(linear(jt.array(x)).numpy(), by_host(jt.array(x)).numpy())


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
