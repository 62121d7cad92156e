"""The score counts what a tree would accept, and its tree is the best one of its size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.score import MAX_RANK, accuracy, count_paths, expected_accept_length, fitted_paths

EXAMPLE = np.array([[0, 0, 2], [1, 0, 0]])  # positions with ranks (0, 1), (0, 0), (2, 0)


@st.composite
def some_ranks(draw, max_depth=4, max_rank=3, max_positions=12):
    depth, positions = draw(st.integers(1, max_depth)), draw(st.integers(1, max_positions))
    flat = draw(st.lists(st.integers(0, max_rank), min_size=depth * positions, max_size=depth * positions))
    return np.array(flat).reshape(depth, positions)


def accepted_by_walking(ranks, tree):
    """Mean tokens of a pass: from the root down while the next true token's node is there, and the bonus token."""
    nodes, tokens = set(map(tuple, tree)), 0
    for position in ranks.T.tolist():
        path, node = [], 0
        while node < len(position) and (*path, position[node]) in nodes:
            path.append(position[node])
            node += 1
        tokens += node + 1
    return tokens / ranks.shape[1]


def test_paths_of_three_positions_are_counted():
    assert count_paths(EXAMPLE) == {(0,): 2, (0, 1): 1, (0, 0): 1, (2,): 1, (2, 0): 1}


def test_an_unknown_rank_and_a_rank_past_the_last_candidate_end_a_path():
    ranks = np.array([[0, 0, -1, MAX_RANK, 0], [1, -1, 0, 0, MAX_RANK], [0, 0, 0, 0, 0]])
    assert count_paths(ranks) == {(0,): 3, (0, 1): 1, (0, 1, 0): 1}


def test_the_fitted_tree_takes_the_most_frequent_paths_shorter_and_lower_ranks_first():
    counts = count_paths(EXAMPLE)
    assert fitted_paths(counts, 1) == []
    assert fitted_paths(counts, 3) == [(0,), (2,)]
    assert fitted_paths(counts, 99) == [(0,), (2,), (0, 0), (0, 1), (2, 0)]


def test_the_expected_accept_length_of_three_positions():
    assert expected_accept_length(EXAMPLE, 1) == 1
    assert expected_accept_length(EXAMPLE, 2) == pytest.approx(1 + 2 / 3)
    assert expected_accept_length(EXAMPLE, 3) == pytest.approx(1 + 3 / 3)
    assert expected_accept_length(EXAMPLE, 6) == pytest.approx(3)


@settings(deadline=None, max_examples=60)
@given(some_ranks(), st.integers(1, 12))
def test_the_expected_accept_length_is_what_walking_the_tree_accepts(ranks, num_nodes):
    tree = fitted_paths(count_paths(ranks), num_nodes)
    assert len(tree) <= num_nodes - 1 and all(path[:-1] in {(), *tree} for path in tree)
    assert expected_accept_length(ranks, num_nodes) == pytest.approx(accepted_by_walking(ranks, tree))
    if tree:  # the walk notices a tree that lacks its most frequent path
        without = [path for path in tree if path[0] != tree[0][0]]
        assert accepted_by_walking(ranks, without) < accepted_by_walking(ranks, tree)


@settings(deadline=None, max_examples=40)
@given(some_ranks(max_depth=2, max_rank=1, max_positions=6), st.integers(1, 6))
def test_no_tree_of_the_same_size_accepts_more(ranks, num_nodes):
    paths = [path for depth in range(1, len(ranks) + 1) for path in itertools.product(range(2), repeat=depth)]
    best = 0
    for size in range(min(num_nodes - 1, len(paths)) + 1):
        for tree in itertools.combinations(paths, size):
            best = max(best, accepted_by_walking(ranks, tree))
    assert expected_accept_length(ranks, num_nodes) == pytest.approx(best)


def test_a_position_counts_as_far_as_its_text_goes():
    ranks = np.array([[0, 0, -1, 0], [0, -1, 0, 1]])
    # Tree (0,), (0, 0): the first position accepts 2, the second and the fourth 1; the third has nothing to draft.
    assert expected_accept_length(ranks, 3) == pytest.approx(1 + 4 / 3)
    with pytest.raises(ValueError, match="held-out text is too short"):
        expected_accept_length(np.array([[-1, -1], [0, 0]]), 4)


def test_a_deeper_head_of_the_same_guesses_scores_no_less():
    """Asking for a label at every depth, the score would compare other positions for every depth."""
    random = np.random.default_rng(0)
    ranks = random.integers(0, 3, (4, 200))
    ranks[np.arange(4)[:, None] >= random.integers(1, 5, 200)] = -1  # texts that end within the tree
    scores = [expected_accept_length(ranks[:depth], 8) for depth in range(1, 5)]
    assert scores == sorted(scores)


def test_accuracy_is_the_share_of_known_positions():
    ranks = np.array([[0, 1, 4, 5], [-1, 0, -1, 9]])
    assert accuracy(ranks, 1) == [0.25, 0.5]
    assert accuracy(ranks, 5) == [0.75, 0.5]
