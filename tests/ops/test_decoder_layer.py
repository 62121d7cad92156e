"""A whole decoder layer in one kernel equals the plain equations, for every way rows may see each other."""

import numpy as np
import pytest

from ops.decoder_layer import (
    NO_LIMIT,
    STRETCH,
    RowPlan,
    decoder_layer,
    keep_rows,
    reference_decoder_layer,
    reference_rms_norm,
    rms_norm,
)
from ops.layer_weights import LayerShape
from runtime import jt
from tests.ops.layers import make_layer, rotary

# Two query heads to a key head, and no width that is a multiple of 16.
SHAPE = LayerShape(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40, eps=1e-5)
PADDED, SLOTS, LAYERS = 16, 24, 2
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
    data = np.random.default_rng(base).standard_normal((LAYERS, 2, 2, SLOTS, PADDED)).astype(dtype)
    data[:, :, :, base:] *= 30
    data[..., SHAPE.head_dim :] = 0
    return data


def both(layer, plan, rope, dtype, base, index=1, reference_plan=None, seed=0):
    """(kernel's y, its cache) and (reference's y, its cache plane) for the same rows."""
    packed, plain = layer
    x = np.random.default_rng(seed).standard_normal((plan.num_rows, SHAPE.hidden_size)).astype(np.float32)
    data = filled_cache(dtype, base)
    cache = jt.array(data)
    cache.sync()
    y = decoder_layer(jt.array(x), packed, plan, *rope, cache, index, base).numpy()
    expected, plane = reference_decoder_layer(
        jt.array(x), plain, reference_plan or plan, *rope, jt.array(data), index, base
    )
    return y, cache.numpy(), expected.numpy(), plane.numpy(), data


@pytest.mark.parametrize(("name", "base"), [*((name, 0) for name in PLANS), ("chain", 9), ("tree", 9), ("one row", 9)])
def test_the_kernel_equals_the_equations(layer, rope, dtype, name, base, tolerance):
    make, rows = PLANS[name]
    y, cache, expected, plane, before = both(layer, make(), rope, dtype, base)
    assert np.abs(y - expected).max() < tolerance
    wrote = slice(base, base + rows)
    assert np.abs(cache[1, :, :, wrote] - plane[:, :, wrote].astype(np.float32)).max() < tolerance
    np.testing.assert_array_equal(cache[0], before[0], err_msg="another layer's plane was touched")
    kept = np.delete(np.arange(SLOTS), np.arange(base, base + rows))
    np.testing.assert_array_equal(cache[1][:, :, kept], before[1][:, :, kept], err_msg="another row was touched")


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
    y = decoder_layer(x, packed, plan, *rope, cache, 0, 0).numpy()
    expected, plane = reference_decoder_layer(x, plain, plan, *rope, jt.array(data), 0, 0)
    assert np.abs(y - expected.numpy()).max() < tolerance
    assert np.abs(cache.numpy()[0] - plane.numpy().astype(np.float32)).max() < tolerance


def test_rms_norm_equals_its_equation(body):
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((5, 37)).astype(np.float32), random.standard_normal(37).astype(np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * weight
    for function in (rms_norm, reference_rms_norm):
        # A mean of 37 squares and four more roundings, relative.
        assert (np.abs(function(jt.array(x), jt.array(weight), 1e-5).numpy() - exact) < 3e-6 * np.abs(exact)).all()
    assert (np.abs(rms_norm(jt.array(x), jt.array(weight), 1e-3).numpy() - exact) > 3e-6 * np.abs(exact)).any()


# Plans


def test_a_tree_plan_splits_ancestors_into_a_stretch_and_extras():
    plan = RowPlan(np.array([-1, 0, 0, 2]))
    np.testing.assert_array_equal(plan.positions, [0, 1, 1, 2])
    np.testing.assert_array_equal(plan.meta_array, [[0, 0, 0, 1], [1, 1, 0, 2], [1, 2, 0, 1], [2, 3, 0, 1]])
    np.testing.assert_array_equal(plan.extras_array, [[-1, -1], [-1, -1], [2, -1], [2, 3]])
    assert plan.max_position == 2


def test_a_mask_shows_the_prefix_the_ancestors_and_the_row_itself():
    mask = RowPlan(np.array([-1, 0, 0, 2])).mask(base=2, num_slots=7)
    expected = ["1110000", "1111000", "1110100", "1110110"]
    np.testing.assert_array_equal(mask, [[c == "1" for c in row] for row in expected])


def test_sequences_see_only_themselves():
    plan = RowPlan.sequences([2, 1, 3])
    np.testing.assert_array_equal(plan.positions, [0, 1, 0, 0, 1, 2])
    expected = ["100000", "110000", "001000", "000100", "000110", "000111"]
    np.testing.assert_array_equal(plan.mask(0, 6), [[c == "1" for c in row] for row in expected])


def test_a_chain_is_a_tree_without_branches_and_a_single_sequence():
    for other in (RowPlan(np.arange(5) - 1), RowPlan.sequences([5])):
        np.testing.assert_array_equal(RowPlan.chain(5).meta_array, other.meta_array)
        np.testing.assert_array_equal(RowPlan.chain(5).mask(3, 9), other.mask(3, 9))


def test_lanes_see_their_own_stretch_up_to_the_new_row():
    plan = RowPlan.lanes([2, 0], capacity=3)
    np.testing.assert_array_equal(plan.positions, [2, 0])
    np.testing.assert_array_equal(plan.mask(0, 6), [[c == "1" for c in row] for row in ("111000", "000100")])


def test_plans_behind_sequences_of_their_own_are_moved_there():
    tree = RowPlan(np.array([-1, 0, 0, 2]))
    plan = RowPlan.behind([tree, RowPlan.chain(2), tree], [0, 20, 40], [3, 5, 1])
    np.testing.assert_array_equal(plan.positions, [3, 4, 4, 5, 5, 6, 1, 2, 2, 3])
    for first, each, start, length in ((0, tree, 0, 3), (4, RowPlan.chain(2), 20, 5), (6, tree, 40, 1)):
        alone = np.zeros((each.num_rows, 60), bool)
        alone[:, start : start + 19] = each.mask(length, 19)
        np.testing.assert_array_equal(plan.mask(0, 60)[first : first + each.num_rows], alone)
    assert plan.max_position == 6


def test_the_mask_of_a_random_tree_is_its_ancestor_relation():
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = int(random.integers(1, 24))
        parents = np.array([int(random.integers(-1, row)) for row in range(rows)])
        seen = np.zeros((rows, 5 + rows), bool)
        seen[:, :5] = True
        for row in range(rows):
            node = row
            while node >= 0:
                seen[row, 5 + node] = True
                node = parents[node]
        np.testing.assert_array_equal(RowPlan(parents).mask(5, 5 + rows), seen)


def test_tiles_say_what_their_rows_have_in_common():
    tree = RowPlan(np.array([-1, 0, 0, 2])).tiles(4)
    np.testing.assert_array_equal(tree.table.numpy(), [[[0, 16, 1, 3]]])
    assert (tree.parts, tree.keys) == (1, 3)
    chains = RowPlan.behind([RowPlan.chain(2)] * 2, [0, 20], [3, 5]).tiles(4)
    np.testing.assert_array_equal(chains.table.numpy(), [[[0, 8, NO_LIMIT, 5], [8, 8, NO_LIMIT, 7]]])
    assert (chains.parts, chains.keys) == (1, 7)


@pytest.mark.parametrize(
    ("rows", "group", "parts"), [(1, 1, 1), (16, 1, 1), (17, 1, 2), (9, 4, 4), (700, 1, 4), (1, 40, 4)]
)
def test_every_query_is_in_one_tile(rows, group, parts):
    tiles = RowPlan.chain(rows).tiles(group)
    assert tiles.parts == parts
    found = []
    for stretch, table in enumerate(tiles.table.numpy()):
        for first, count, _, keys in table[table[:, 1] > 0]:
            assert count <= 16 * parts
            found += range(stretch * STRETCH * group + first, stretch * STRETCH * group + first + count)
            assert keys == found[-1] // group + 1
    assert found == list(range(rows * group))


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, 2, 0], [-2], [], [[-1, 0]]])
def test_parents_that_are_no_earlier_rows_are_refused(parents):
    with pytest.raises(ValueError, match="attend must name an earlier row or -1"):
        RowPlan(np.array(parents))


# Cache rows


@pytest.mark.parametrize("path", [[0, 2, 5], [1], [3, 4, 5], [0, 1, 2], [1, 2, 3, 6], [1, 3, *range(4, 15)]])
def test_kept_rows_move_as_in_numpy(dtype, path, body):
    data = np.random.default_rng(1).standard_normal((LAYERS, 2, 2, SLOTS, PADDED)).astype(dtype)
    cache = jt.array(data)
    cache.sync()
    keep_rows(cache, 8 + np.array(path, np.int32), 8 + np.arange(len(path), dtype=np.int32))
    expected = data.copy()
    expected[:, :, :, 8 : 8 + len(path)] = data[:, :, :, 8 + np.array(path)]
    np.testing.assert_array_equal(cache.numpy(), expected)
