"""Verification by hand, by brute force, and with known random numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.tree import Tree
from decoding.verify import entropy, verify_greedy, verify_lossless, verify_typical

FOUR = Tree.from_paths([[0], [1], [1, 0]])


def run(tree, tokens, chosen):
    path, bonus = verify_greedy(tree.parents, np.array(tokens, np.int32), np.array(chosen, np.int32))
    assert path.dtype == np.int32 and isinstance(bonus, int)
    return path.tolist(), bonus


def test_the_worked_example():
    assert run(FOUR, [7, 4, 5, 9], [5, 3, 9, 8]) == ([0, 2, 3], 8)


def test_where_no_child_fits_there_is_only_the_bonus():
    assert run(FOUR, [7, 4, 5, 9], [6, 3, 9, 8]) == ([0], 6)


def test_a_path_ends_where_it_no_longer_fits():
    assert run(FOUR, [7, 4, 5, 9], [5, 3, 1, 8]) == ([0, 2], 1)
    assert run(FOUR, [7, 4, 5, 9], [4, 3, 9, 8]) == ([0, 1], 3)


def test_a_child_counts_only_after_an_accepted_parent():
    # Node 3 fits what follows node 2, but the backbone chose node 1.
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
    few = st.integers(0, 2)  # few tokens, so that drafts often fit and siblings are sometimes equal
    rows = st.lists(few, min_size=tree.num_nodes, max_size=tree.num_nodes)
    return tree, draw(rows), draw(rows)


def by_hand(tree, tokens, chosen):
    """The longest of all paths from the root that fit. A path through a later one of two equal siblings does not
    count."""
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
def test_verification_emits_what_the_backbone_chose_step_by_step(case):
    tree, tokens, chosen = case
    path, bonus = run(tree, tokens, chosen)
    assert path[0] == 0 and path == sorted(path)
    emitted = [tokens[node] for node in path[1:]] + [bonus]
    assert emitted == [chosen[node] for node in path]
    assert all(tree.parents[child] == parent for parent, child in itertools.pairwise(path))


class Rolls:
    """A generator with these uniform numbers, all of which must be used."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


class Table:
    """Distributions by node; records the nodes that it was called for."""

    def __init__(self, rows):
        self.rows, self.visited = [np.array(row, np.float64) for row in rows], []

    def __call__(self, node):
        self.visited.append(node)
        return self.rows[node]


def run_lossless(tree, tokens, target, rolls, draft=None):
    rng = Rolls(*rolls)
    path, bonus = verify_lossless(tree.parents, np.array(tokens, np.int32), target, rng, draft)
    assert rng.numbers == [] and path.dtype == np.int32 and isinstance(bonus, int)
    return path.tolist(), bonus


ONE = Tree.chain(1)
TWO = Tree.from_paths([[0], [1]])
THREE = Tree.from_paths([[0], [1], [2]])


def test_the_worked_example_of_lossless_verification():
    target, draft = Table([[0.2, 0.8], [0.9, 0.1]]), Table([[0.6, 0.4]])
    assert run_lossless(ONE, [7, 0], target, [0.33, 0.5], draft) == ([0, 1], 0)  # .33 < .2 / .6; the bonus after node 1
    assert run_lossless(ONE, [7, 0], target, [0.34, 0.001], draft) == ([0], 1)  # [0 .4] has token 1 alone
    assert run_lossless(ONE, [7, 1], target, [0.999, 0.95], draft) == ([0, 1], 1)


def test_a_rejected_sibling_is_removed_from_the_target_and_the_draft():
    # After token 0: p becomes [0 .2 .2] / .4, q [0 .3 .2] / .5, so token 1 is accepted below .5 / .6.
    target, draft = Table([[0.1, 0.5, 0.4], [1, 0, 0], [1, 0, 0]]), Table([[0.5, 0.3, 0.2]])
    assert run_lossless(TWO, [7, 0, 1], target, [0.19, 0.5], draft) == ([0, 1], 0)
    assert run_lossless(TWO, [7, 0, 1], target, [0.21, 0.83, 0.5], draft) == ([0, 2], 0)
    assert run_lossless(TWO, [7, 0, 1], target, [0.21, 0.84, 0.01], draft) == ([0], 2)  # left: [0 0 .1]


def test_without_a_draft_distribution_the_child_with_the_drawn_token_is_accepted():
    target = Table([[0, 0, 0, 0, 0.5, 0.5], [1] * 6, [0] * 5 + [1], [1, 0, 0, 0, 0, 0]])
    assert run_lossless(FOUR, [2, 4, 5, 5], target, [0.7, 0.3, 0.9]) == ([0, 2, 3], 0)
    assert target.visited == [0, 2, 3]  # only the visited nodes
    assert run_lossless(FOUR, [2, 4, 3, 5], target, [0.7]) == ([0], 5)


def test_of_equal_guesses_the_first_is_accepted():
    target = Table([[0, 1], [1, 0], [1, 0]])
    assert run_lossless(TWO, [0, 1, 1], target, [0.5, 0.5]) == ([0, 1], 0)


def test_guesses_beyond_the_draft_distribution_are_accepted_when_they_are_drawn():
    # q has token 0 alone; what is left of p after it is [0 .375 .625].
    target, draft = Table([[0.2, 0.3, 0.5], [1, 0, 0], [1, 0, 0], [1, 0, 0]]), Table([[1, 0, 0]])
    assert run_lossless(THREE, [7, 0, 1, 2], target, [0.5, 0.37, 0.0], draft) == ([0, 2], 0)
    assert run_lossless(THREE, [7, 0, 1, 2], target, [0.5, 0.38, 0.0], draft) == ([0, 3], 0)
    assert run_lossless(TWO, [7, 0, 1], target, [0.5, 0.38], draft) == ([0], 2)


def test_a_rejection_by_rounding_does_not_change_p():
    # p and q differ only in the last bits, so max(p - q, 0) is zero. Token 2, which p excludes, is not emitted.
    p, q = [0.5, 0.5, 0.0], [0.5, 0.5, 1e-17]
    assert run_lossless(ONE, [7, 2], Table([p, p]), [0.0, 0.75], Table([q])) == ([0], 1)


def test_a_token_that_the_target_excludes_is_always_rejected():
    assert run_lossless(ONE, [7, 0], Table([[0, 1]] * 2), [0.0, 0.3], Table([[1, 0]])) == ([0], 1)


def run_typical(tree, tokens, target, rolls, epsilon=0.3, alpha=0.3):
    rng = Rolls(*rolls)
    path, bonus, distances = verify_typical(tree.parents, np.array(tokens, np.int32), target, epsilon, alpha, rng)
    assert rng.numbers == [] and path.dtype == np.int32 and isinstance(bonus, int) and len(distances) == len(path)
    return path.tolist(), bonus, distances.tolist()


def test_the_worked_example_of_typical_acceptance():
    p = [0.5, 0.25, 0.25]
    assert np.exp(-entropy(np.array(p))) == pytest.approx(0.3536, abs=1e-4)
    target = Table([p, [0, 1, 0], [0, 1, 0]])
    assert run_typical(TWO, [9, 2, 0], target, [0.5]) == ([0, 2], 1, [0.5, 0])


def test_a_guess_is_accepted_above_the_threshold_and_not_on_it():
    # p = [.5 .5]: exp(-H) is .5, so alpha .6 gives .3 and epsilon .5 does not count; with epsilon .25 it does.
    target = Table([[0.5, 0.5, 0.0], [1, 0, 0]])
    assert run_typical(ONE, [9, 1], target, [0.1], epsilon=0.5, alpha=0.6)[0] == [0, 1]
    assert run_typical(ONE, [9, 1], target, [0.1], epsilon=0.5, alpha=1.1)[0] == [0]
    assert run_typical(ONE, [9, 1], target, [0.1], epsilon=0.25, alpha=1.1)[0] == [0, 1]
    assert run_typical(ONE, [9, 2], target, [0.1], epsilon=0.0, alpha=0.0)[0] == [0]  # what has no chance never does


def test_the_longest_accepted_path_wins_over_a_more_probable_one():
    target = Table([[0.6, 0.4], [0, 1], [0.3, 0.7], [0, 1]])
    assert run_typical(FOUR, [9, 0, 1, 0], target, [0.5]) == ([0, 2, 3], 1, [0.6, 0.7, 0])


def test_of_equally_long_paths_the_most_probable_wins_and_then_the_first():
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    rows = [[0.6, 0.4], [0.4, 0.6], [0.2, 0.8], [1, 0], [1, 0]]
    assert run_typical(tree, [9, 0, 1, 0, 1], Table(rows), [0.5], 0.1)[0] == [0, 2, 4]  # .6 * .4 against .4 * .8
    assert run_typical(TWO, [9, 1, 1], Table([[0.5, 0.5]] * 3), [0.5], 0.1)[0] == [0, 1]


def test_a_child_of_a_rejected_node_is_not_visited():
    target = Table([[0.99, 0.01], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]])
    path, bonus, distances = run_typical(FOUR, [9, 1, 1, 1], target, [0.2])
    assert (path, bonus, distances) == ([0], 0, [0]) and target.visited == [0]


@given(trees_with_tokens())
def test_at_temperature_0_every_rule_is_greedy(case):
    tree, tokens, chosen = case
    target = Table(np.eye(3)[chosen])
    greedy = run(tree, tokens, chosen)
    rolls = [0.999] * len(greedy[0])
    assert run_lossless(tree, tokens, target, rolls) == greedy
    path, bonus, distances = run_typical(tree, tokens, target, [0.999], 0.09, 0.3)
    assert len(path) >= len(greedy[0])  # of equal siblings it takes the one on the longer path
    assert [tokens[node] for node in path[1:]] + [bonus] == [chosen[node] for node in path] and not any(distances)
