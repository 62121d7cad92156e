"""Trees shaped by confidence hold the most confident candidates and do not change the text."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from decoding.dynamic import Candidate, assemble, best, draft_dynamic
from decoding.generate import generate, generate_autoregressive, generate_batch
from decoding.rules import Lossless
from decoding.sampling import Sampler
from decoding.tree import DynamicTree
from heads.base import Head
from heads.registry import build
from runtime import jt
from tests.small import small_backbone

VOCAB = 6


class TableHead(Head):
    """Guesses by a fixed table of the last two tokens; the state is the token before. A wrong parent changes them."""

    Config = SimpleNamespace

    def __init__(self, num_depths=3, seed=0, draft_vocab=None):
        borrowed = SimpleNamespace(config=SimpleNamespace(hidden_size=4, vocab_size=VOCAB))
        super().__init__(SimpleNamespace(num_depths=num_depths), borrowed)
        self.draft_vocab = draft_vocab
        columns = VOCAB if draft_vocab is None else len(draft_vocab)
        self.table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB, columns)).astype(np.float32) * 2

    def step(self, state, token_ids, parents):
        before, tokens = state.numpy()[parents.numpy(), 0], token_ids.numpy()
        return jt.array(self.table[before, tokens]), jt.array(tokens[:, None])

    def log_probabilities(self, before, token):
        row = self.table[before, token].astype(np.float64)
        return row - np.log(np.exp(row - row.max()).sum()) - row.max()


class ParallelTable(Head):
    """Guesses that depend only on the depth."""

    Config = SimpleNamespace
    parallel = True

    def __init__(self, num_depths=3):
        borrowed = SimpleNamespace(config=SimpleNamespace(hidden_size=4, vocab_size=VOCAB))
        super().__init__(SimpleNamespace(num_depths=num_depths), borrowed)
        self.table = np.random.default_rng(1).standard_normal((num_depths, VOCAB)).astype(np.float32) * 2

    def score_depths(self, state, num_depths):
        return jt.array(self.table[:num_depths])


START = jt.array(np.array([[1]], np.int32))


def brute_force(step, depth, num_nodes):
    """The num_nodes - 1 most probable paths of tokens. step(path) -> log probabilities of the next token."""
    found = []
    for length in range(1, depth + 1):
        for path in itertools.product(range(VOCAB), repeat=length):
            score = sum(step(path[:i])[path[i]] for i in range(length))
            found.append((-score, length, path))
    return {path for _, _, path in sorted(found)[: num_nodes - 1]}


def paths_of(tree, tokens):
    paths = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[tree.parents[node]], int(tokens[node])))
    return set(paths[1:])


@pytest.mark.parametrize(("seed", "num_nodes"), [(0, 2), (1, 5), (2, 12), (3, 12)])
def test_the_tree_holds_the_most_confident_paths(seed, num_nodes):
    """With the width of the whole vocabulary nothing is cut off, so brute force gives the same tree."""
    head = TableHead(num_depths=2, seed=seed)

    def step(path):
        before, token = [1, 3, *path][-2:]
        return head.log_probabilities(before, token)

    tree, tokens = draft_dynamic(head, START, 3, DynamicTree(num_nodes, 2, VOCAB))
    assert tokens[0] == 3 and tree.num_nodes == num_nodes
    assert paths_of(tree, tokens) == brute_force(step, 2, num_nodes)


def test_the_tree_of_a_parallel_head_is_that_of_its_probabilities():
    head = ParallelTable()
    logits = head.table.astype(np.float64)
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tree, tokens = draft_dynamic(head, None, 3, DynamicTree(14, 2, VOCAB))
    assert paths_of(tree, tokens) == brute_force(lambda path: table[len(path)], 2, 14)


def test_the_width_limits_the_expanded_nodes():
    head = TableHead(num_depths=3, seed=2)
    tree, tokens = draft_dynamic(head, START, 3, DynamicTree(9, 3, 2))
    assert tree.max_rank <= 1 and tree.depth <= 3
    for depth in range(3):
        inner = [n for n in range(tree.num_nodes) if tree.depths[n] == depth and tree.has_children[n]]
        assert len(inner) <= 2
    assert len(paths_of(tree, tokens)) == 8


def test_columns_of_a_draft_vocabulary_are_read_as_its_tokens():
    vocab = np.array([5, 0, 3], np.int32)
    head = TableHead(num_depths=2, seed=3, draft_vocab=vocab)
    tree, tokens = draft_dynamic(head, START, 3, DynamicTree(8, 2, 3))
    assert set(tokens[1:].tolist()) <= set(vocab.tolist())
    first = vocab[np.argsort(-head.table[1, 3], kind="stable")]
    for node in range(1, tree.num_nodes):
        if tree.parents[node] == 0:
            assert tokens[node] == first[tree.ranks[node]]


def test_of_equal_confidence_the_parent_is_chosen():
    """A certain child is as confident as its parent, which must be chosen first."""
    a, b = Candidate(0.0, -1, 0, 0, 4), Candidate(-9.0, -1, 0, 1, 5)
    c, d = Candidate(0.0, 0, 0, 0, 2), Candidate(-9.0, 0, 0, 1, 3)
    tree, tokens = assemble([a, b, c, d], 7, 2)
    assert tree.parents.tolist() == [-1, 0] and tokens.tolist() == [7, 4]
    tree, tokens = assemble([a, b, c, d], 7, 3)
    assert tree.parents.tolist() == [-1, 0, 1] and tokens.tolist() == [7, 4, 2]
    assert best([a, b, c, d], range(4), 3) == [0, 1, 2]


@pytest.mark.parametrize("least", [0.05, 0.2, 0.5])
def test_nodes_below_the_minimum_confidence_are_left_out(least):
    whole, sizes = DynamicTree(30, 3, VOCAB), set()
    for seed in range(6):
        head = TableHead(num_depths=3, seed=seed)

        def confidence(path, head=head):
            tokens = [1, 3, *path]
            steps = range(len(path))
            return np.exp(sum(head.log_probabilities(*tokens[i : i + 2])[tokens[i + 2]] for i in steps))

        paths = paths_of(*draft_dynamic(head, START, 3, replace(whole, min_confidence=least)))
        assert paths == {path for path in paths_of(*draft_dynamic(head, START, 3, whole)) if confidence(path) >= least}
        sizes.add(len(paths))
    assert len(sizes) > 1


def test_an_unconfident_head_drafts_nothing_and_the_text_is_the_same(small):
    head = build("mlp", {"num_depths": 3}, small)
    shape = DynamicTree(7, 3, 4, min_confidence=0.99)
    baseline = generate_autoregressive(small, [3, 4, 5], max_new_tokens=20)
    result = generate(small, head, [3, 4, 5], shape, max_new_tokens=20)
    assert result.token_ids == baseline.token_ids and result.num_passes == baseline.num_passes


@pytest.fixture(scope="module")
def small():
    return small_backbone()


@pytest.mark.parametrize("name", ["mlp", "gated_rnn", "eagle", "prompt_lookup"])
def test_the_greedy_text_is_the_baselines_alone_and_in_a_batch(small, name):
    head, shape = build(name, {"num_depths": 4}, small), DynamicTree(7, 3, 4)
    head.eval()
    prompts = [[3, 14, 15, 9, 26], [7, 8, 9] * 9, [19, 20] * 6]
    baselines = [generate_autoregressive(small, prompt, max_new_tokens=20).token_ids for prompt in prompts]
    alone = [generate(small, head, prompt, shape, max_new_tokens=20) for prompt in prompts]
    assert [each.token_ids for each in alone] == baselines
    together = generate_batch(small, head, prompts, shape, max_new_tokens=20)
    assert [each.accepted_per_pass for each in together] == [each.accepted_per_pass for each in alone]
    assert [each.token_ids for each in together] == baselines
    for each in alone:
        assert len(each.reached_by_depth) == 3 and sum(each.accepted_by_depth) + each.num_passes >= 19


def test_impossible_limits_and_heads_that_cannot_draft_as_deep_are_refused(small):
    for sizes in ((1, 2, 2), (4, 0, 2), (4, 2, 0)):
        with pytest.raises(ValueError, match="a dynamic tree needs"):
            DynamicTree(*sizes)
    with pytest.raises(ValueError, match="depth 2 and width 2 give at most 7 nodes, asked for 8"):
        DynamicTree(8, 2, 2)
    DynamicTree(7, 2, 2)
    for least in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="a probability below 1"):
            DynamicTree(7, 2, 2, least)
    head = build("mlp", {"num_depths": 2}, small)
    with pytest.raises(ValueError, match="depth 3, the head drafts 2"):
        generate(small, head, [3], DynamicTree(7, 3, 4), max_new_tokens=4)
    with pytest.raises(ValueError, match="the width is 80"):
        generate(small, head, [3], DynamicTree(7, 2, 80), max_new_tokens=4)
    with pytest.raises(ValueError, match="fixed before they are drawn"):
        generate(small, head, [3], DynamicTree(7, 2, 4), max_new_tokens=4, rule=Lossless(Sampler(), sampled=True))
