"""Ranks predict decoding: the replay counts what generate counts, and the search finds the fastest tree for a cost."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.acceptance import RankedText, count_ranks, replay
from decoding.generate import generate
from decoding.search import LatencyCurve, interpolate, refine, search, shortlist
from decoding.tree import Tree, default_tree
from heads.ranks import MAX_RANK, last_accepted

FOUR = Tree.from_paths([[0], [1], [1, 0]])
NUM_NEW, DEPTHS, NEVER = 40, 4, 99


def table_of(rank_of, prompt, num_tokens):
    """The ranks of a fake head that offers the token at ``index`` at rank_of(index, depth), or never."""
    ranks = [
        [NEVER if rank_of(len(prompt) + i + 1 + d, d + 1) is None else rank_of(len(prompt) + i + 1 + d, d + 1)
         for i in range(num_tokens - 1)]
        for d in range(DEPTHS)
    ]  # fmt: skip
    return RankedText(np.array(ranks, np.int32).reshape(DEPTHS, -1), len(prompt))


def counted(generation):
    """The counts of one text, as a Replay has them."""
    return [generation.accepted_per_pass], generation.reached_by_depth, generation.accepted_by_depth


def replayed(*arguments):
    found = replay(*arguments)
    return found.accepted_per_pass, found.reached_by_depth, found.accepted_by_depth


@pytest.fixture
def known(backbone, prompts, continuations, make_head):
    """known(kind, number) -> (head, prompt, continuation, rank_of) of a head that knows the text."""

    def make(kind, number):
        prompt, continuation = prompts[number], continuations["float32"][number]
        head = make_head(kind, backbone, prompt, continuation)
        return head, prompt, continuation, head.rank_of

    return make


# Replay --------------------------------------------------------------------------------------------------------------


def test_the_last_accepted_nodes_of_four_positions():
    ranks = np.array([[0, 1, 1, 2, -1], [0, 0, 3, 0, 0]])
    assert last_accepted(ranks, FOUR.paths).tolist() == [1, 3, 2, 0, 0]
    assert last_accepted(ranks[:, :0], FOUR.paths).tolist() == []
    assert last_accepted(ranks, []).tolist() == [0] * 5


def test_the_replay_of_five_tokens():
    text = RankedText(np.array([[0, 0, 3, 0], [0, 3, 0, -1]]))
    found = replay([text], Tree.chain(2))
    assert (found.accepted_per_pass, found.reached_by_depth, found.accepted_by_depth) == ([[3, 1]], [2, 2], [2, 1])
    assert (found.passes, found.tokens, found.accept_length) == (2, 4, 2.0)
    assert replay([text], Tree.autoregressive()).accepted_per_pass == [[1] * 4]


@pytest.mark.parametrize("fake", ["sequential-all", "parallel-none", "sequential-prefix", "parallel-mixed"])
def test_the_replay_counts_what_generate_counts(backbone, known, fake, tree):
    for number in (1, 8) if "mixed" in fake else (8,):
        head, prompt, _, rank_of = known(fake, number)
        result = generate(backbone, head, prompt, tree, max_new_tokens=NUM_NEW)
        assert replayed([table_of(rank_of, prompt, NUM_NEW)], tree) == counted(result)
        # A longer text, cut at the same length.
        assert replayed([table_of(rank_of, prompt, NUM_NEW + 9)], tree, NUM_NEW)[0] == [result.accepted_per_pass]


def test_the_replay_notices_ranks_of_another_column(backbone, known):
    """Control of the test above."""
    head, prompt, _, rank_of = known("sequential-mixed", 8)
    result = generate(backbone, head, prompt, default_tree(16, 4), max_new_tokens=NUM_NEW)
    right = table_of(rank_of, prompt, NUM_NEW)
    wrong = RankedText(np.roll(right.ranks, 1, axis=1), right.prompt_tokens)
    assert replayed([wrong], default_tree(16, 4)) != counted(result) == replayed([right], default_tree(16, 4))


@pytest.mark.parametrize("rows", [20, 27, 33])
def test_the_replay_ends_its_drafts_where_the_cache_does(backbone, known, rows):
    head, prompt, _, rank_of = known("sequential-mixed", 4)
    tree = default_tree(16, 4)
    result = generate(backbone, head, prompt, tree, max_new_tokens=NUM_NEW, cache=backbone.new_cache(rows))
    assert result.finish_reason == "cache"
    table = table_of(rank_of, prompt, len(result.token_ids))
    assert replayed([table], tree, None, rows) == counted(result)
    assert replayed([table], tree)[0] != [result.accepted_per_pass]  # with room it would have drafted on


def test_a_stop_token_ends_the_replay_inside_a_path(backbone, known):
    head, prompt, continuation, rank_of = known("sequential-all", 8)
    stop = continuation[6]
    result = generate(backbone, head, prompt, Tree.chain(4), max_new_tokens=NUM_NEW, stop_ids=[stop])
    assert result.finish_reason == "stop" and len(result.token_ids) == continuation.index(stop) + 1
    table = table_of(rank_of, prompt, len(result.token_ids))
    assert replayed([table], Tree.chain(4)) == counted(result)  # tokens known past the end count by depth


def test_texts_are_replayed_one_by_one():
    random = np.random.default_rng(0)
    texts = [RankedText(random.integers(0, 3, (2, length)), 1) for length in (0, 1, 5, 30)]
    together = replay(texts, FOUR)
    alone = [replay([text], FOUR) for text in texts]
    assert together.accepted_per_pass == [each.accepted_per_pass[0] for each in alone]
    assert together.reached_by_depth == np.sum([each.reached_by_depth for each in alone], axis=0).tolist()
    assert together.passes == sum(each.passes for each in alone) and together.accepted_per_pass[0] == []
    assert replay([], FOUR).accept_length is replay(texts[:1], FOUR).accept_length is None


# Counts --------------------------------------------------------------------------------------------------------------


def test_each_depth_has_a_total_of_its_own():
    reached, accepted = count_ranks(np.array([[0, 0, MAX_RANK], [1, -1, 0]]))
    assert reached.tolist() == [3, 1]
    assert accepted[0].tolist() == [2] + [0] * 9 and accepted[1].tolist() == [0, 1] + [0] * 8


def test_the_conditional_counts_are_the_chances_of_the_text_they_came_from():
    """Texts drawn with known chances per depth; a division by all positions would be off by a factor at depth 2."""
    random = np.random.default_rng(0)
    chances = np.array([[0.5, 0.25], [0.6, 0.2]])
    ranks = np.stack([random.choice([0, 1, MAX_RANK], 20_000, p=[*row, 1 - sum(row)]) for row in chances])
    reached, accepted = count_ranks(ranks)
    found = accepted[:, :2] / reached[:, None]
    assert np.abs(found - chances).max() < 0.02
    assert abs(accepted[1, 0] / reached[0] - chances[1, 0]) > 0.1
    # The accept length that they predict is that of passes that start anywhere, as here.
    predicted = 1 + sum(np.prod([found[depth, rank] for depth, rank in enumerate(path)]) for path in FOUR.paths)
    assert replay([RankedText(ranks)], FOUR).accept_length == pytest.approx(predicted, rel=0.03)


# Search --------------------------------------------------------------------------------------------------------------


@st.composite
def some_texts(draw):
    depth = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    flat = iter(draw(st.lists(st.integers(-1, 3), min_size=depth * sum(lengths), max_size=depth * sum(lengths))))
    return [RankedText(np.array([next(flat) for _ in range(depth * n)], np.int32).reshape(depth, n)) for n in lengths]


def walk(text, tree):
    """The passes of one text by definition: each follows the ranks through the set of paths."""
    nodes, root, passes = set(map(tuple, tree.paths)), 0, []
    while root < text.num_tokens - 1:
        path = ()
        for rank in text.ranks[:, root].tolist():
            if (*path, rank) not in nodes:
                break
            path = (*path, rank)
        passes.append(min(len(path) + 1, text.num_tokens - 1 - root))
        root += len(path) + 1
    return passes


@settings(deadline=None, max_examples=60)
@given(some_texts(), st.integers(1, 9), st.sampled_from([0.0, 0.1, 2.0]))
def test_every_candidate_is_replayed_correctly_and_the_first_is_the_fastest(texts, max_nodes, row):
    found = search(texts, lambda tree: 1 + row * tree.num_nodes, max_nodes)
    assert len({each.tree for each in found}) == len(found)
    assert any(each.tree.depth == 0 for each in found)
    for each in found:
        assert each.tree.num_nodes <= max_nodes and each.tree.depth <= len(texts[0].ranks)
        assert each.replay.accepted_per_pass == [walk(text, each.tree) for text in texts]
    speeds = [each.accept_length / (1 + row * each.tree.num_nodes) for each in found]
    assert speeds == sorted(speeds, reverse=True) and found[0].tokens_per_s == speeds[0]
    better = refine(texts, found[0].tree)
    assert better.num_nodes == found[0].tree.num_nodes and better.depth <= max(1, found[0].tree.depth)
    assert replay(texts, better).accept_length >= found[0].accept_length


@pytest.fixture
def drawn():
    """One long text of random ranks, where the first guess is right more often than the second, and so on."""
    random = np.random.default_rng(1)
    return [RankedText(random.choice([0, 1, 2, MAX_RANK], (3, 4000), p=[0.5, 0.2, 0.1, 0.2]).astype(np.int32))]


def test_the_cost_of_a_row_decides_the_size(drawn):
    sizes = [search(drawn, lambda tree, c=c: 1 + c * (tree.num_nodes - 1), 32)[0].tree.num_nodes for c in (0, 0.05, 9)]
    assert sizes[0] > 20 and 2 < sizes[1] < sizes[0] and sizes[2] == 1
    by_depth = [search(drawn, lambda tree, c=c: 1 + c * tree.depth, 32)[0].tree.depth for c in (0, 0.4, 9)]
    assert by_depth == sorted(by_depth, reverse=True) and by_depth[0] == 3 and by_depth[-1] == 0


def test_where_the_first_guess_is_always_right_a_chain_is_best():
    text = RankedText(np.zeros((3, 60), np.int32))
    assert search([text], lambda tree: 1 + 0.1 * tree.num_nodes, 16)[0].tree == Tree.chain(3)
    assert search([text], lambda tree: 1 + 0.1 * tree.num_nodes, 3)[0].tree == Tree.chain(2)


def test_a_search_without_nodes_or_tokens_is_refused(drawn):
    with pytest.raises(ValueError, match="max_nodes=0"):
        search(drawn, lambda tree: 1.0, 0)
    with pytest.raises(ValueError, match="nothing to draft"):
        search([RankedText(np.zeros((3, 0), np.int32))], lambda tree: 1.0, 4)


def test_the_shortlist_has_the_root_and_trees_of_different_sizes(drawn):
    ordered = search(drawn, lambda tree: 1 + 0.05 * tree.num_nodes, 32)
    chosen = shortlist(ordered, 5)
    sizes = sorted(each.tree.num_nodes for each in chosen)
    assert sizes[0] == 1 and len(chosen) == 5 and ordered[0] in chosen
    assert all(large >= 1.3 * small for small, large in pairwise(sizes))
    assert [each.tree.depth for each in shortlist(ordered, 1)] == [0]


def test_a_refined_tree_is_counted_where_passes_start():
    """Ranks 0 0 1 2 1 2 again and again: 0 is as frequent as 1, but with node 0 no pass starts at its second place."""
    text = [RankedText(np.tile(np.array([[0, 0, 1, 2, 1, 2]], np.int32), 20))]
    zero, one = Tree.from_paths([[0]]), Tree.from_paths([[1]])
    assert (replay(text, zero).accept_length, replay(text, one).accept_length) == (6 / 5, 6 / 4)
    assert search(text, lambda tree: 1.0, 2)[0].tree == zero
    assert refine(text, zero) == refine(text, one) == one
    assert refine(text, Tree.autoregressive()) == Tree.autoregressive()


# Cost ----------------------------------------------------------------------------------------------------------------

CURVE = LatencyCurve(
    context=10,
    rows=[1, 2, 4],
    verify_s=[1.0, 2.0, 3.0],
    begin_s=0.5,
    widths=[1, 3],
    draft_s=[[0.1, 0.3, 0.6], [0.1, 0.7, 0.5]],
    rest_s=0.25,
    root_rest_s=0.125,
)


def test_points_between_and_beyond_those_of_a_curve():
    assert [interpolate(x, (1, 3), (10, 20)) for x in (0, 1, 2, 3, 5)] == [10, 10, 15, 20, 30]
    assert interpolate(9, (1,), (4,)) == 4 and interpolate(9, (1, 2), (4, 3)) == 3  # never falls beyond the last point


def test_a_chain_in_one_call_costs_its_measured_time():
    curve = dataclasses.replace(CURVE, chain_s=[0.05, 0.08, 0.11])
    assert curve.seconds_per_pass(Tree.chain(2)) == pytest.approx(2.5 + 0.08 + 0.25)
    pair = Tree.from_paths([[0], [1]])  # no chain: step by step
    assert curve.seconds_per_pass(pair) == CURVE.seconds_per_pass(pair)
    assert curve.seconds_per_pass(Tree.autoregressive()) == CURVE.seconds_per_pass(Tree.autoregressive())


def test_a_pass_costs_its_rows_and_the_nodes_scored_at_each_depth():
    assert CURVE.seconds_per_pass(Tree.autoregressive()) == pytest.approx(1.0 + 0.125)
    assert CURVE.seconds_per_pass(Tree.chain(1)) == pytest.approx(2.0 + 0.5 + 0.1 + 0.25)
    assert CURVE.seconds_per_pass(Tree.chain(3)) == pytest.approx(3.0 + 0.5 + 0.6 + 0.25)
    # The root, then two nodes: half-way between 0.2 for one and 0.6 for three.
    pair = Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    assert CURVE.seconds_per_pass(pair) == pytest.approx(3.5 + 0.5 + 0.1 + 0.4 + 0.25)
    # A depth that was measured as faster than the one before it costs nothing, not less.
    three = Tree.from_paths([[rank, *[0] * below] for rank in range(3) for below in range(3)])
    assert CURVE.drafting(three) == pytest.approx(0.5 + 0.1 + 0.6)
