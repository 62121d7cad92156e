"""A whole decoder layer in one kernel equals the plain equations, for every way rows may see each other."""

import numpy as np
import pytest

from ops.cache_rows import keep_rows
from ops.layer_weights import LayerShape
from ops.row_plan import RowPlan
from runtime import jt
from tests.ops.layers import decoder_layer, make_layer, rotary
from tests.ops.references import reference_decoder_layer

# Two query heads to a key head, and no width that is a multiple of 16.
SHAPE = LayerShape(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40, eps=1e-5)
PADDED, SLOTS = 16, 24
# float32: sums of at most 40 terms of size about 1, twice each: some 1e-6. float16: a key or value that the two sides
# round to different neighbours is off by 2^-11 of its size. CUDA's products round their rows to float16 too: four of
# them with sums of up to 40 terms of size about 1, each off by 2^-11 at most.
TOLERANCE = {
    ("float32", "cpu"): 2e-5,
    ("float32", "cuda"): 2e-5,
    ("float16", "cpu"): 2e-3,
    ("float16", "cuda"): 4e-2,
}
TREE = [-1, 0, 0, 1, 2, 2, 5]
PLANS = {
    "one row": (lambda: RowPlan.chain(1), 1),
    "chain": (lambda: RowPlan.chain(7), 7),
    "tree": (lambda: RowPlan(np.array(TREE)), 7),
    "forest": (lambda: RowPlan(np.array([-1, 0, -1, 2, 1, 3])), 6),
    "sequences": (lambda: RowPlan.sequences([3, 1, 2]), 6),
}


@pytest.fixture(scope="module", params=["float32", "float16"])
def dtype(request):
    return request.param


@pytest.fixture
def tolerance(dtype, body):
    return TOLERANCE[dtype, body]


@pytest.fixture
def layer(dtype, body):
    """(packed weights for the body's kernel, plain (out, in) weights for the reference) of one random layer."""
    return make_layer(SHAPE, dtype)


@pytest.fixture(scope="module")
def rope():
    return rotary(SHAPE.head_dim, 64)


def filled_cache(dtype, base):
    """A cache whose first ``base`` rows hold something; the rest is nonsense that no row may look at."""
    data = np.random.default_rng(base).standard_normal((1, 2, 2, SLOTS, PADDED)).astype(dtype)
    data[:, :, :, base:] *= 30
    data[..., SHAPE.head_dim :] = 0
    return data


def both(layer, plan, rope, dtype, base, reference_plan=None):
    """(kernel's y, its cache) and (reference's y, its cache plane) for the same rows."""
    packed, plain = layer
    x = np.random.default_rng(0).standard_normal((plan.num_rows, SHAPE.hidden_size)).astype(np.float32)
    data = filled_cache(dtype, base)
    cache = jt.array(data)
    cache.sync()
    y = decoder_layer(jt.array(x), packed, plan, *rope, cache, base).numpy()
    expected, plane = reference_decoder_layer(
        jt.array(x), plain, reference_plan or plan, *rope, jt.array(data), 0, base
    )
    return y, cache.numpy(), expected.numpy(), plane.numpy(), data


@pytest.mark.parametrize(("name", "base"), [*((name, 0) for name in PLANS), ("chain", 9), ("tree", 9), ("one row", 9)])
def test_the_kernel_equals_the_equations(layer, rope, dtype, name, base, tolerance):
    make, rows = PLANS[name]
    y, cache, expected, plane, before = both(layer, make(), rope, dtype, base)
    assert np.abs(y - expected).max() < tolerance
    wrote = slice(base, base + rows)
    assert np.abs(cache[0, :, :, wrote] - plane[:, :, wrote].astype(np.float32)).max() < tolerance
    others = np.delete(np.arange(SLOTS), np.arange(base, base + rows))
    np.testing.assert_array_equal(cache[0][:, :, others], before[0][:, :, others], err_msg="another row was touched")


@pytest.mark.parametrize(
    "parents",
    [[-1, 0, 0, 1, 2, 2, 2], [-1, 0, 0, 1, 2, 1, 5]],
    ids=["a leaf on its grandparent", "a leaf on its uncle"],
)
def test_the_comparison_notices_a_wrong_mask(layer, rope, dtype, parents, tolerance):
    wrong = RowPlan(np.array(parents), positions=RowPlan(np.array(TREE)).positions)
    y, _, expected, _, _ = both(layer, RowPlan(np.array(TREE)), rope, dtype, 9, reference_plan=wrong)
    assert np.abs(y - expected).max() > 10 * tolerance


def test_the_comparison_notices_a_wrong_position(layer, rope, dtype, tolerance):
    plan = RowPlan(np.array(TREE))
    shifted = RowPlan(np.array(TREE), positions=plan.positions + (np.arange(7) == 6))
    y, _, expected, _, _ = both(layer, plan, rope, dtype, 9, reference_plan=shifted)
    assert np.abs(y - expected).max() > 10 * tolerance


def test_lanes_write_one_row_in_each_stretch(layer, rope, dtype, tolerance):
    plan = RowPlan.lanes([4, 0, 7], capacity=8)
    packed, plain = layer
    x = jt.array(np.random.default_rng(5).standard_normal((3, SHAPE.hidden_size)).astype(np.float32))
    data = filled_cache(dtype, SLOTS)
    cache = jt.array(data)
    cache.sync()
    y = decoder_layer(x, packed, plan, *rope, cache, 0).numpy()
    expected, plane = reference_decoder_layer(x, plain, plan, *rope, jt.array(data), 0, 0)
    assert np.abs(y - expected.numpy()).max() < tolerance
    assert np.abs(cache.numpy()[0] - plane.numpy().astype(np.float32)).max() < tolerance


# Cache rows


@pytest.mark.parametrize("path", [[0, 2, 5], [1], [3, 4, 5], [0, 1, 2], [1, 2, 3, 6], [1, 3, *range(4, 15)]])
def test_kept_rows_move_as_in_numpy(dtype, path, body):
    data = np.random.default_rng(1).standard_normal((2, 2, 2, SLOTS, PADDED)).astype(dtype)
    cache = jt.array(data)
    cache.sync()
    keep_rows(cache, 8 + np.array(path, np.int32), 8 + np.arange(len(path), dtype=np.int32))
    expected = data.copy()
    expected[:, :, :, 8 : 8 + len(path)] = data[:, :, :, 8 + np.array(path)]
    np.testing.assert_array_equal(cache.numpy(), expected)
