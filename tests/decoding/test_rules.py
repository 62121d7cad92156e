"""Rules in the loop: a seed repeats its text, drawn drafts come from the reported distribution, and the counts add
up."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import decoding.verify as verification
from backbone.model import BackboneOutput
from decoding.draft import draft, draft_sampled
from decoding.generate import generate, generate_autoregressive
from decoding.rules import Greedy, Lossless, Typical
from decoding.sampling import Sampler, softmax
from decoding.tree import Tree, default_tree
from heads.base import Features, Head
from runtime import jt
from tests.g_test import CERTAIN, LEVEL, g_test
from tests.small import small_backbone

PROMPT = [3, 14, 15, 9, 26]
TREE = default_tree(8, 3)
NUM_NEW = 24


@pytest.fixture(scope="module")
def small():
    return small_backbone()


class ParallelMixingHead(Head):
    """Called once for all depths; its logits are a fixed random function of the last hidden state."""

    Config = SimpleNamespace
    parallel = True

    def __init__(self, backbone, num_depths=4, draft_vocab=None):
        super().__init__(SimpleNamespace(num_depths=num_depths), backbone)
        self.draft_vocab = draft_vocab
        random = np.random.default_rng(5)
        shape = (num_depths, self.dim, self.num_draftable)
        self.out = jt.array((random.standard_normal(shape) * 0.5).astype(np.float32)).stop_grad()
        self.eval()

    def begin(self, features, token_ids, state=None):
        return features.hidden[0, -1:]

    def score_depths(self, state, num_depths):
        return jt.concat([jt.matmul(state, self.out[depth]) for depth in range(num_depths)])


@pytest.fixture(params=["sequential", "parallel", "parallel, some tokens"])
def head(request, small, mixing_head):
    if request.param == "sequential":
        return mixing_head(small)
    some = np.arange(1, 60, 3, dtype=np.int32) if "some" in request.param else None
    return ParallelMixingHead(small, draft_vocab=some)


class TableHead(SimpleNamespace):
    """The logits (columns,) of a node's children follow from its own token alone."""

    parallel, vocab_size = False, 8

    def step(self, state, token_ids, parents):
        return jt.array(self.table[token_ids.numpy()]), token_ids


VOCABS = {"every token": None, "some tokens": np.array([6, 1, 3, 4, 0], np.int32)}


@pytest.mark.parametrize("vocab", VOCABS)
def test_drawn_drafts_come_from_the_reported_distribution(vocab):
    """Counts of ordered pairs of children, of the root and of one of its children, against their exact
    probabilities."""
    draft_vocab, temperature, num_draws = VOCABS[vocab], 0.7, 4000
    columns = 8 if draft_vocab is None else len(draft_vocab)
    table = np.random.default_rng(0).normal(0, 1, (8, columns)).astype(np.float32)
    head, rng = TableHead(table=table, draft_vocab=draft_vocab), np.random.default_rng(1)
    tree = Tree.from_paths([[0], [2], [2, 0], [2, 1]])  # the second child is the second draw, for any rank
    first, second = {}, {}
    with jt.no_grad():
        for _ in range(num_draws):
            state = jt.array(np.array([5], np.int32))
            tokens, drawn_from = draft_sampled(head, state, 5, tree, temperature, rng)
            assert tokens.dtype == np.int32 and tokens[0] == 5
            first[tuple(tokens[1:3].tolist())] = first.get(tuple(tokens[1:3].tolist()), 0) + 1
            if tokens[2] == 3:
                second[tuple(tokens[3:5].tolist())] = second.get(tuple(tokens[3:5].tolist()), 0) + 1
                inner = drawn_from(2)
    for pairs, row, reported in ((first, 5, drawn_from(0)), (second, 3, inner)):
        q = np.zeros(8)
        q[np.arange(8) if draft_vocab is None else draft_vocab] = softmax(table[row][None], temperature)[0]
        assert np.array_equal(reported, q)
        total = sum(pairs.values())
        possible = list(itertools.permutations(np.flatnonzero(q).tolist(), 2))
        expected = np.array([total * q[a] * q[b] / (1 - q[a]) for a, b in possible])
        counts = np.array([pairs.get(pair, 0) for pair in possible])
        assert counts.sum() == total > 100
        assert g_test(counts, expected) > LEVEL


def test_every_node_is_drawn_after_its_own_path(small, mixing_head, tree):
    """The reported distribution of a node's children is the head's after that node's path alone."""
    head = mixing_head(small)
    with jt.no_grad():
        state = head.begin(Features(jt.ones((1, 1, head.dim))), None)
        tokens, drawn_from = draft_sampled(head, state, 11, tree, 0.5, np.random.default_rng(0))
        for node in np.flatnonzero(tree.has_children).tolist():
            path = [node]
            while path[0] != 0:
                path.insert(0, int(tree.parents[path[0]]))
            here, zero = state, jt.array(np.zeros(1, np.int32))
            for step in path:
                logits, here = head.step(here, jt.array(tokens[step : step + 1]), zero)
            assert drawn_from(node) == pytest.approx(softmax(logits.numpy(), 0.5)[0], rel=1e-4)
            children = tokens[tree.parents == node]
            assert len(set(children.tolist())) == len(children)


def test_a_parallel_head_has_one_distribution_for_all_nodes_of_a_depth(small):
    head, tree = ParallelMixingHead(small), Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    with jt.no_grad():
        state = head.begin(Features(jt.ones((1, 1, head.dim))), None)
        expected = softmax(head.score_depths(state, 2).numpy(), 1.0)
        _, drawn_from = draft_sampled(head, state, 11, tree, 1.0, np.random.default_rng(0))
    assert np.array_equal(drawn_from(0), expected[0])
    assert np.array_equal(drawn_from(1), expected[1]) and np.array_equal(drawn_from(2), expected[1])


def test_a_lone_root_draws_nothing():
    tokens, _ = draft_sampled(SimpleNamespace(parallel=True), None, 5, Tree.autoregressive(), 1.0, None)
    assert tokens.tolist() == [5]


def rules(seed=3):
    """A new rule of every kind that samples."""
    sampler = Sampler(0.9, top_p=0.95)
    return [Lossless(sampler, seed), Lossless(sampler, seed, sampled=True), Typical(sampler, 0.09, 0.3, seed)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_seed_repeats_its_text_and_another_seed_gives_another(small, head, which):
    def text(rule):
        return generate(small, head, PROMPT, TREE, max_new_tokens=NUM_NEW, rule=rule).token_ids

    rule = rules()[which]
    first = text(rule)
    assert text(rule) == text(rules()[which]) == first  # a reused rule starts from its seed
    assert text(rules(seed=[3, 1])[which]) != first
    assert generate_autoregressive(small, PROMPT, max_new_tokens=NUM_NEW, rule=rule).token_ids == (
        generate_autoregressive(small, PROMPT, max_new_tokens=NUM_NEW, rule=rules()[which]).token_ids
    )


@pytest.mark.parametrize("sampler", [Sampler(0), Sampler(1.0, top_k=1), Sampler(1.0, top_p=1e-9)])
def test_every_rule_that_leaves_one_token_writes_the_greedy_text(small, mixing_head, sampler):
    head = mixing_head(small)
    greedy = generate_autoregressive(small, PROMPT, max_new_tokens=NUM_NEW).token_ids
    for rule in (None, Greedy(), Lossless(sampler), Lossless(sampler, sampled=True), Typical(sampler)):
        result = generate(small, head, PROMPT, TREE, max_new_tokens=NUM_NEW, rule=rule)
        assert result.token_ids == greedy
        assert result.total_variation == (0.0 if isinstance(rule, Typical) else None)
        assert generate_autoregressive(small, PROMPT, max_new_tokens=NUM_NEW, rule=rule).token_ids == greedy


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_counts_add_up(small, head, which):
    pieces = []
    result = generate(small, head, PROMPT, TREE, max_new_tokens=NUM_NEW, rule=rules()[which], on_tokens=pieces.append)
    assert result.finish_reason == "length" and len(result.token_ids) == NUM_NEW
    assert sum(result.accepted_per_pass) == NUM_NEW - 1 and len(result.accepted_per_pass) == result.num_passes
    assert [len(piece) for piece in pieces] == [1, *result.accepted_per_pass]
    emitted = result.num_passes + sum(result.accepted_by_depth)
    assert NUM_NEW - 1 <= emitted <= NUM_NEW - 1 + TREE.depth
    assert all(a <= r for a, r in zip(result.accepted_by_depth, result.reached_by_depth, strict=True))


def test_a_full_cache_is_filled_to_the_end(small, head):
    for rule in rules():
        result = generate(small, head, PROMPT, TREE, max_new_tokens=60, rule=rule, cache=small.new_cache(30))
        assert result.finish_reason == "cache" and len(result.token_ids) == 1 + 30 - len(PROMPT)


def test_typical_acceptance_reports_its_distance(small, head):
    """A threshold that no guess passes is exact; one that all pass accepts whole paths."""
    sampler = Sampler(0.9)
    none = generate(small, head, PROMPT, TREE, max_new_tokens=NUM_NEW, rule=Typical(sampler, 1.0, 1e6))
    assert none.total_variation == 0.0 and none.num_passes == NUM_NEW - 1
    every = generate(small, head, PROMPT, TREE, max_new_tokens=NUM_NEW, rule=Typical(sampler, 0.0, 0.0))
    assert every.accepted_by_depth == [every.num_passes] * TREE.depth
    accepted = sum(every.accepted_by_depth)
    assert 0.5 * accepted < every.total_variation <= accepted
    baseline = generate_autoregressive(small, PROMPT, max_new_tokens=NUM_NEW, rule=Typical(sampler, 0.0, 0.0))
    assert baseline.total_variation == 0.0


def test_the_distance_of_one_pass_by_hand():
    rule = Typical(Sampler(), 0.09, 0.3)
    rows = np.log([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]])
    for total in (0.3, 0.6):
        path, _ = rule.accept(Tree.chain(1), np.array([0, 1], np.int32), rows)
        assert path.tolist() == [0, 1] and rule.total_variation == pytest.approx(total)
    rule.start()
    assert rule.total_variation == 0.0


def second_and_third(backbone, head, tree, sampler, num_texts):
    """Observed and expected counts of each pair of second and third token in texts with drawn drafts, (vocab, vocab)
    each. The first token is the prefill's."""
    vocab, cache = backbone.config.vocab_size, backbone.new_cache(40)

    def after(*tokens):
        row = backbone.forward(np.array([[*PROMPT, *tokens]], np.int32), logits="last").logits.numpy()[0]
        return sampler.probabilities(row)[0]

    exact, counts, first = np.zeros((vocab, vocab)), np.zeros((vocab, vocab)), after()
    for a in np.flatnonzero(first).tolist():
        second = after(a)
        for b in np.flatnonzero(second).tolist():
            exact[b] += first[a] * second[b] * after(a, b)
    for seed in range(num_texts):
        rule = Lossless(sampler, seed, sampled=True)
        text = generate(backbone, head, PROMPT, tree, max_new_tokens=3, rule=rule, cache=cache)
        counts[text.token_ids[1], text.token_ids[2]] += 1
    return counts, num_texts * exact


def test_the_loop_draws_from_the_backbones_distribution(small, mixing_head, monkeypatch):
    """From drafting to the text; the control keeps p after a rejection."""
    tree, sampler = Tree.from_paths([[0], [1], [2], [3], [0, 0], [0, 1], [1, 0]]), Sampler(top_k=4)
    assert g_test(*second_and_third(small, mixing_head(small), tree, sampler, 600)) > LEVEL
    monkeypatch.setattr(verification, "_residual", lambda p, q: p)
    assert g_test(*second_and_third(small, mixing_head(small), tree, sampler, 400)) < CERTAIN


def test_greedy_reads_one_token_per_row():
    output = BackboneOutput(None, None, chosen=jt.array(np.array([[1, 0]], np.int32)))
    assert Greedy().read(output).tolist() == [1, 0] and Greedy().choose(np.int32(4)) == 4


def test_drafts_of_best_guesses_are_those_of_draft(small, head):
    with jt.no_grad():
        state = head.begin(Features(jt.ones((1, 1, head.dim))), None)
        expected = draft(head, state, 9, TREE).tolist()
        for rule in (Greedy(), rules()[0], rules()[2]):
            tokens, drawn_from = rule.draft(head, state, 9, TREE)
            assert tokens.tolist() == expected and drawn_from is None


def test_thresholds_that_make_no_rule_are_refused():
    for epsilon in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="epsilon must lie between 0 and 1"):
            Typical(Sampler(), epsilon)
    for alpha in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="alpha must be a finite number from 0"):
            Typical(Sampler(), 0.1, alpha)
