"""Trees as values, their plans, and the best tree under an acceptance model."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.tree import Tree, best_tree, check_tree, default_acceptance, default_tree

FOUR = [[0], [1], [1, 0]]


def expected_accept_length(tree, acceptance):
    """Tokens a pass is expected to emit, the bonus token included, as ``best_tree`` defines it."""
    return 1 + sum(np.prod([acceptance[depth][rank] for depth, rank in enumerate(path)]) for path in tree.paths)


@st.composite
def path_sets(draw, max_nodes=12):
    """Rank paths of a random tree, shuffled."""
    paths = [()]
    for _ in range(draw(st.integers(0, max_nodes))):
        path = (*draw(st.sampled_from(paths)), draw(st.integers(0, 4)))
        if path not in paths:
            paths.append(path)
    return draw(st.permutations(paths[1:]))


def test_the_worked_example_of_four_tokens():
    tree = Tree.from_paths(FOUR)
    assert tree.parents.tolist() == [-1, 0, 0, 2]
    assert tree.depths.tolist() == [0, 1, 1, 2]
    assert tree.ranks.tolist() == [0, 0, 1, 0]
    assert tree.parents.dtype == tree.depths.dtype == tree.ranks.dtype == np.int32
    assert (tree.num_nodes, tree.depth, tree.max_rank) == (4, 2, 1)
    assert tree.paths == FOUR
    assert tree.has_children == (True, False, True, False)


def test_the_plan_of_the_worked_example_sees_prefix_and_ancestors_only():
    tree = Tree.from_paths(FOUR)
    assert tree.plan is tree.plan
    assert tree.plan.mask(1, 5).astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert tree.plan.positions.tolist() == tree.depths.tolist()


def test_chain_and_lone_root():
    assert Tree.chain(3).paths == [[0], [0, 0], [0, 0, 0]]
    lone = Tree.autoregressive()
    assert (lone.num_nodes, lone.depth, lone.max_rank, lone.paths) == (1, 0, 0, [])
    assert lone == Tree.chain(0) == Tree.from_paths([]) == default_tree(1, 4)


def test_a_tree_is_a_frozen_value():
    tree = Tree.from_paths(FOUR)
    with pytest.raises(ValueError):
        tree.parents[1] = 0
    with pytest.raises(AttributeError):
        tree.parents = np.zeros(4)
    assert tree == Tree.from_paths(FOUR[::-1]) and hash(tree) == hash(Tree.from_paths(FOUR))
    assert tree != Tree.chain(3) and tree != FOUR


@given(path_sets())
def test_nodes_are_breadth_first_and_paths_come_back(paths):
    tree = Tree.from_paths(paths)
    keys = list(zip(tree.depths, tree.parents, tree.ranks, strict=True))
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert sorted(map(tuple, tree.paths)) == sorted(paths)
    assert Tree.from_paths(tree.paths) == tree
    assert tree.depth == max(map(len, paths), default=0)
    inner = {p[:-1] for p in paths}
    assert tree.has_children == tuple(tuple(path) in inner for path in [(), *tree.paths])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], []], r"empty path \[\]"),
        ([[0], [1, 0]], r"path \[1, 0\] has no parent; add \[1\]"),
        ([[0], [0]], r"path \[0\] is given twice"),
        ([[0], [0, -1]], r"path \[0, -1\] must hold ranks"),
        ([[0], [0, 1.0]], r"path \[0, 1.0\] must hold ranks"),
        ([[True]], r"path \[True\] must hold ranks"),
    ],
)
def test_bad_paths_are_named(paths, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_paths(paths)


@pytest.mark.parametrize(
    ("parents", "ranks"),
    [([], []), ([0], [0]), ([-1, 1], [0, 0]), ([-1, -1], [0, 0]), ([-1, 0], [0, -1]), ([-1, 0, 0], [0, 1, 0]),
     ([-1, 0, 0], [0, 1, 1]), ([-1, 0, 1, 0], [0, 0, 0, 1]), ([-1, 0], [0])],
)  # fmt: skip
def test_arrays_that_are_no_tree_are_refused(parents, ranks):
    with pytest.raises(ValueError):
        Tree(parents, ranks)


def test_the_default_model_meets_its_table_and_stays_a_probability():
    table = default_acceptance(6, 1000)
    np.testing.assert_allclose(table[:4, 0], [0.40, 0.35, 0.32, 0.31])
    np.testing.assert_allclose(table[:4, :5].sum(1), [0.70, 0.64, 0.62, 0.62])
    assert (table[4:] == table[3]).all()
    assert (np.diff(table) < 0).all() and (table.sum(1) < 1).all()


@pytest.mark.parametrize(("num_nodes", "depth"), [(1, 4), (2, 1), (16, 1), (16, 2), (64, 4), (64, 5)])
def test_the_default_tree_has_the_nodes_asked_for(num_nodes, depth):
    tree = default_tree(num_nodes, depth)
    assert tree.num_nodes == num_nodes and tree.depth <= depth


def test_the_default_tree_of_four_nodes():
    # 1 * .40 and 1 * .18 for the root's children, .40 * .35 = .14 below the first, .063 for the root's third.
    assert default_tree(4, 4).paths == [[0], [1], [0, 0]]


# Jittor's libraries are built -Ofast and flush subnormal numbers to zero, which hypothesis minds.
CHANCES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=3, max_size=3)


@given(st.lists(CHANCES, min_size=1, max_size=2), st.integers(1, 4))
def test_the_best_tree_beats_every_other(acceptance, num_nodes):
    depth = len(acceptance)
    every = [path for level in range(1, depth + 1) for path in itertools.product(range(3), repeat=level)]
    best = 0.0
    for paths in itertools.combinations(every, num_nodes - 1):
        if all(path[:-1] in (*paths, ()) for path in paths):
            best = max(best, expected_accept_length(Tree.from_paths(paths), acceptance))
    tree = best_tree(num_nodes, acceptance)
    assert tree.num_nodes == num_nodes
    assert expected_accept_length(tree, acceptance) == pytest.approx(best)


def test_measured_acceptance_need_not_fall_with_the_rank():
    assert best_tree(3, [[0.1, 0.6], [0.2, 0.5]]).paths == [[1], [1, 1]]


@pytest.mark.parametrize(
    ("num_nodes", "acceptance", "message"),
    [
        (8, [[0.5, 0.5], [0.5, 0.5]], "at most 7 nodes, asked for 8"),
        (0, [[0.5]], "at least its root"),
        (2, [[1.5]], "from 0 to 1"),
        (2, [[float("nan")]], "from 0 to 1"),
        (2, [0.5], "depth, ranks"),
    ],
)
def test_a_best_tree_that_cannot_exist_is_refused(num_nodes, acceptance, message):
    with pytest.raises(ValueError, match=message):
        best_tree(num_nodes, acceptance)


def test_a_tree_without_depth_is_refused():
    with pytest.raises(ValueError, match="depth of at least 1"):
        default_tree(2, 0)
    with pytest.raises(ValueError, match="at least 0 tokens"):
        Tree.chain(-1)


def test_a_tree_deeper_than_the_head_is_refused():
    check_tree(Tree.chain(4), 4, 10)
    with pytest.raises(ValueError, match="the tree has depth 5, the head drafts 4 tokens; use --nodes or a tree of"):
        check_tree(Tree.chain(5), 4, 10)


def test_a_tree_wider_than_the_vocabulary_is_refused():
    check_tree(Tree.from_paths([[9]]), 4, 10)
    with pytest.raises(ValueError, match="takes 11 candidates of a node, the vocabulary has 10 tokens"):
        check_tree(Tree.from_paths([[10]]), 4, 10)
