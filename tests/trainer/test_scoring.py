"""The score counts what a tree would accept, and the fitted tree is the best of its size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.ranks import MAX_RANK, accepted_depths, count_paths, fitted_paths, walk
from runtime.files.documents import plain
from trainer import scoring
from trainer.scoring import Score, accuracy, expected_accept_length, own_replies

EXAMPLE = np.array([[0, 0, 2], [1, 0, 0]])  # positions with ranks (0, 1), (0, 0), (2, 0)


@st.composite
def some_ranks(draw, max_depth=4, max_rank=3, max_positions=12):
    depth, positions = draw(st.integers(1, max_depth)), draw(st.integers(1, max_positions))
    flat = draw(st.lists(st.integers(0, max_rank), min_size=depth * positions, max_size=depth * positions))
    return np.array(flat).reshape(depth, positions)


def accepted_by_walking(ranks, lengths, tree):
    """Tokens per pass, token by token: from a root down while the next true token's node is there, and a bonus token,
    unless the reply ends before."""
    nodes, tokens, passes, first = set(map(tuple, tree)), 0, 0, 0
    for length in lengths:
        reply, here = ranks[:, first : first + length].T.tolist(), 0
        while here < length:
            path = []
            while len(path) < len(reply[here]) and (*path, reply[here][len(path)]) in nodes:
                path.append(reply[here][len(path)])
            passes += 1
            for _ in range(len(path) + 1):
                tokens, here = tokens + (here < length), here + 1
        first += length
    return tokens / passes


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


def test_the_worked_examples_of_accepted_depths_and_walk():
    assert accepted_depths(EXAMPLE, [(0,), (0, 0)]).tolist() == [1, 2, 0]
    assert walk(np.array([2, 0, 0, 1]), [4]) == [[3, 1]]
    assert walk(np.array([2, 0, 0, 1]), [2, 2]) == [[2], [1, 1]]


def test_the_expected_accept_length_follows_the_passes():
    # Chain of one, guesses right, wrong, right, right, wrong: passes from positions 0, 2 and 4 emit 2, 2 and 1.
    ranks = np.array([[0, 5, 0, 0, 5]])
    assert expected_accept_length(ranks, [5], 2) == pytest.approx(5 / 3)
    assert expected_accept_length(ranks, [5], 1) == 1
    # Cut into two replies, the second begins at position 2: passes from 0, 2 and 4 again; cut at 1: from 0, 1, 2, 4.
    assert expected_accept_length(ranks, [2, 3], 2) == pytest.approx(5 / 3)
    assert expected_accept_length(ranks, [1, 4], 2) == pytest.approx(5 / 4)


@settings(deadline=None, max_examples=80)
@given(some_ranks(), st.integers(1, 12), st.data())
def test_the_expected_accept_length_is_what_walking_the_tree_accepts(ranks, num_nodes, draw):
    tree = fitted_paths(count_paths(ranks), num_nodes)
    assert len(tree) <= num_nodes - 1 and all(path[:-1] in {(), *tree} for path in tree)
    cut = draw.draw(st.integers(1, ranks.shape[1]))
    lengths = [cut, ranks.shape[1] - cut] if cut < ranks.shape[1] else [cut]
    assert expected_accept_length(ranks, lengths, num_nodes) == pytest.approx(accepted_by_walking(ranks, lengths, tree))


@settings(deadline=None, max_examples=40)
@given(some_ranks(max_depth=2, max_rank=1, max_positions=6), st.integers(1, 6))
def test_no_tree_of_the_same_size_accepts_more_from_the_positions(ranks, num_nodes):
    paths = [path for depth in range(1, len(ranks) + 1) for path in itertools.product(range(2), repeat=depth)]
    best = 0
    for size in range(min(num_nodes - 1, len(paths)) + 1):
        for tree in itertools.combinations(paths, size):
            closed = [path for path in tree if path[:-1] in {(), *tree}]
            best = max(best, accepted_depths(ranks, closed).sum())
    assert accepted_depths(ranks, fitted_paths(count_paths(ranks), num_nodes)).sum() == best


def test_a_position_counts_as_far_as_its_text_goes():
    ranks = np.array([[0, 0, -1, 0], [0, -1, 0, 1]])
    # Tree (0,), (0, 0): the first position accepts 2, the second and the fourth 1; the third has nothing to draft and
    # is left out, so the reply has three positions and the first pass takes them all.
    assert expected_accept_length(ranks, [4], 3) == 3
    with pytest.raises(ValueError, match="held-out text is too short"):
        expected_accept_length(np.array([[-1, -1], [0, 0]]), [2], 4)


def test_accuracy_is_the_share_of_known_positions():
    ranks = np.array([[0, 1, 4, 5], [-1, 0, -1, 9]])
    assert accuracy(ranks, 1) == [0.25, 0.5]
    assert accuracy(ranks, 5) == [0.75, 0.5]


@pytest.mark.filterwarnings("error")
def test_a_depth_without_a_label_has_no_accuracy_instead_of_none_right():
    first, second = accuracy(np.array([[0, 1], [-1, -1]]), 1)
    assert first == 0.5 and np.isnan(second)
    stored = plain(Score(1.5, [first, second], [1.0, np.nan], [0.25, np.nan], [[0]], {}).__dict__)
    assert (stored["top1"], stored["loss"]) == ([0.5, None], [0.25, None])
    again = Score.restore(stored)
    assert again.loss[0] == 0.25 and np.isnan([again.loss[1], again.top1[1], again.top5[1]]).all()


def test_only_replies_that_the_backbone_would_have_generated_count(monkeypatch):
    monkeypatch.setattr(scoring, "MIN_REPLIES", 1)
    ranks = np.array([[0, 5, 0, 0, 5]])
    own = np.array([True, True, True, False, True])
    counted, lengths = own_replies(ranks, np.array([2, 3]), own)
    assert counted.tolist() == [[0, 5]] and lengths.tolist() == [2]
    monkeypatch.setattr(scoring, "MIN_REPLIES", 2)  # too few of them: all count
    counted, lengths = own_replies(ranks, np.array([2, 3]), own)
    assert counted.tolist() == ranks.tolist() and lengths.tolist() == [2, 3]
