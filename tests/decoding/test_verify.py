import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from decoding.tree import Tree
from decoding.verify import verify_greedy

FOUR = Tree.from_paths([[0], [1], [1, 0]])


def run(tree, tokens, chosen):
    path, bonus = verify_greedy(tree.parents, np.array(tokens, np.int32), np.array(chosen, np.int32))
    assert path.dtype == np.int32 and isinstance(bonus, int)
    return path.tolist(), bonus


def test_the_worked_example():
    assert run(FOUR, [7, 4, 5, 9], [5, 3, 9, 8]) == ([0, 2, 3], 8)


def test_no_child_fits_leaves_the_bonus():
    assert run(FOUR, [7, 4, 5, 9], [6, 3, 9, 8]) == ([0], 6)


def test_a_path_stops_where_it_stops_fitting():
    assert run(FOUR, [7, 4, 5, 9], [5, 3, 1, 8]) == ([0, 2], 1)
    assert run(FOUR, [7, 4, 5, 9], [4, 3, 9, 8]) == ([0, 1], 3)


def test_a_child_counts_only_below_an_accepted_parent():
    # Node 3 fits what follows node 2, but the backbone wanted node 1.
    assert run(FOUR, [7, 4, 5, 9], [4, 9, 9, 8]) == ([0, 1], 9)


def test_of_equal_siblings_the_first_is_taken():
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    assert run(tree, [7, 4, 4, 1, 9], [4, 9, 9, 8, 8]) == ([0, 1], 9)


def test_a_lone_root_gives_the_bonus():
    assert run(Tree.autoregressive(), [7], [3]) == ([0], 3)


def test_a_whole_chain():
    assert run(Tree.chain(3), [7, 1, 2, 3], [1, 2, 3, 4]) == ([0, 1, 2, 3], 4)


@st.composite
def trees_with_tokens(draw):
    paths = [()]
    for _ in range(draw(st.integers(0, 10))):
        path = (*draw(st.sampled_from(paths)), draw(st.integers(0, 3)))
        if path not in paths:
            paths.append(path)
    tree = Tree.from_paths(paths[1:])
    few = st.integers(0, 2)  # few words, so that drafts fit often and siblings are sometimes equal
    rows = st.lists(few, min_size=tree.num_nodes, max_size=tree.num_nodes)
    return tree, draw(rows), draw(rows)


def by_hand(tree, tokens, chosen):
    """Every path from the root to a node, and whether all of it fits; the longest wins, then the one whose nodes come
    first. A path through a later one of two equal siblings is no candidate."""
    fitting = []
    for node in range(tree.num_nodes):
        path = [node]
        while path[0] != 0:
            path.insert(0, int(tree.parents[path[0]]))
        fits = all(tokens[child] == chosen[parent] for parent, child in itertools.pairwise(path))
        first = not any(
            tree.parents[other] == tree.parents[child] and tokens[other] == tokens[child]
            for child in path[1:]
            for other in range(1, child)
        )
        if fits and first:
            fitting.append(path)
    best = max(fitting, key=len)
    return best, chosen[best[-1]]


@given(trees_with_tokens())
def test_verification_finds_the_longest_fitting_path(case):
    tree, tokens, chosen = case
    assert run(tree, tokens, chosen) == by_hand(tree, tokens, chosen)


@given(trees_with_tokens())
def test_verification_is_one_step_of_the_backbone_after_another(case):
    tree, tokens, chosen = case
    path, bonus = run(tree, tokens, chosen)
    assert path[0] == 0 and path == sorted(path)
    emitted = [tokens[node] for node in path[1:]] + [bonus]
    assert emitted == [chosen[node] for node in path]
    assert all(tree.parents[child] == parent for parent, child in itertools.pairwise(path))
