"""Plans say which keys each row of a pass sees, where it writes its own, and how CUDA's blocks share the queries."""

import numpy as np
import pytest

from ops.row_plan import NO_LIMIT, STRETCH, RowPlan


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
    plan = RowPlan.after([tree, RowPlan.chain(2), tree], [0, 20, 40], [3, 5, 1])
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
    chains = RowPlan.after([RowPlan.chain(2)] * 2, [0, 20], [3, 5]).tiles(4)
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
