"""Emitted tokens are distributed as the backbone's own draws: G-tests of pairs of tokens, and their controls.

A text is a walk over tables: the distribution of the next token follows from the last two. The first and the second
emitted token are counted over many texts, from any number of passes, and compared with their exact joint distribution.
"""

import functools

import numpy as np
import pytest

import decoding.verify as verification
from backbone.model import load_backbone
from decoding.sampling import Sampler, draw_without_replacement, softmax
from decoding.tree import Tree, default_tree
from decoding.verify import verify_lossless, verify_typical
from runtime import jt
from tests.g_test import CERTAIN, LEVEL, g_test

VOCAB, NUM_DRAWS, CONTROL_DRAWS = 6, 20_000, 5_000
TREES = {
    "chain": Tree.chain(3),
    "wide": Tree.from_paths([[0], [1], [2], [3], [0, 0], [0, 1], [1, 0]]),
    "mixed": Tree.from_paths([[2], [0], [2, 1], [2, 1, 0], [0, 3]]),
    "default": default_tree(16, 4),
    "all": Tree.from_paths([[rank] for rank in range(VOCAB)]),
}
SAMPLERS = {
    "T 1": Sampler(),
    "T 0.7": Sampler(0.7),
    "top-p": Sampler(top_p=0.8),
    "top-k": Sampler(0.7, top_k=3),
    "both": Sampler(1.3, top_p=0.9, top_k=4),
}


class World:
    """Tables of the backbone's and the head's distributions of the next token, given the last two.

    logits, guesses: (vocab, vocab, vocab), entry [a, b] after the tokens a, b; a text starts after 0, 0.
    """

    def __init__(self, sampler, logits, guesses, draft_temperature=1.0):
        vocab = logits.shape[-1]
        self.target = sampler.probabilities(logits.reshape(-1, vocab)).reshape(logits.shape)
        self.draft = softmax(guesses.reshape(-1, vocab), draft_temperature).reshape(logits.shape)
        self.best = np.argsort(-self.draft, axis=-1, kind="stable")

    def joint(self):
        """The exact distribution of the first two tokens, (vocab * vocab,)."""
        first = self.target[0, 0]
        return (first[:, None] * self.target[0]).reshape(-1)

    def guess(self, tree, before, sampled, rng):
        """The tokens of all nodes: the best guesses, or drawn ones. before: the last two tokens, the root the last."""
        tokens = np.full(tree.num_nodes, before[1], np.int32)
        for node, children in children_of(tree).items():
            context = (before[0] if node == 0 else tokens[tree.parents[node]], tokens[node])
            if sampled:
                tokens[children] = draw_without_replacement(self.draft[context], len(children), rng)
            else:
                tokens[children] = self.best[context][tree.ranks[children]]
        return tokens

    def after(self, table, tree, tokens, before):
        """node -> the table's distribution after it."""
        return lambda node: table[before[0] if node == 0 else tokens[tree.parents[node]], tokens[node]]

    def counts(self, tree, sampled, num_draws, verify=verify_lossless, seed=0):
        """Counts of each pair of first tokens, (vocab * vocab,), over ``num_draws`` texts."""
        rng, vocab = np.random.default_rng(seed), self.target.shape[-1]
        fixed, counts = {}, np.zeros(vocab * vocab)
        for _ in range(num_draws):
            text = [0, 0]
            while len(text) < 4:
                before = text[-2], text[-1]
                tokens = self.guess(tree, before, True, rng) if sampled else fixed.get(before)
                if tokens is None:
                    tokens = fixed[before] = self.guess(tree, before, False, rng)
                q = self.after(self.draft, tree, tokens, before) if sampled else None
                path, bonus, *_ = verify(
                    tree.parents, tokens, self.after(self.target, tree, tokens, before), rng, draft=q
                )
                text += [*tokens[path[1:]].tolist(), bonus]
            counts[text[2] * vocab + text[3]] += 1
        return counts

    def p_value(self, tree, sampled, num_draws=NUM_DRAWS, **options):
        return g_test(self.counts(tree, sampled, num_draws, **options), num_draws * self.joint())


@functools.cache
def children_of(tree):
    """node -> its children, for nodes with children, parents first."""
    return {node: np.flatnonzero(tree.parents == node) for node in np.flatnonzero(tree.has_children).tolist()}


def random_world(sampler, seed=0, **options):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (VOCAB, VOCAB, VOCAB))
    return World(sampler, logits, logits + random.normal(0, 1.0, logits.shape), **options)


@pytest.mark.parametrize(
    ("sampler", "tree"),
    [("T 1", "chain"), ("T 0.7", "wide"), ("top-p", "mixed"), ("top-k", "default"), ("both", "all")],
)
def test_guesses_that_follow_from_the_text_do_not_change_the_distribution(sampler, tree):
    assert random_world(SAMPLERS[sampler]).p_value(TREES[tree], sampled=False) > LEVEL


@pytest.mark.parametrize(
    ("sampler", "tree"),
    [
        ("T 1", "chain"), ("T 1", "all"), ("T 1", "default"), ("T 0.7", "mixed"),
        ("top-p", "wide"), ("top-k", "wide"), ("top-k", "default"), ("both", "mixed"),
    ],
)  # fmt: skip
def test_drawn_drafts_do_not_change_the_distribution(sampler, tree):
    assert random_world(SAMPLERS[sampler]).p_value(TREES[tree], sampled=True) > LEVEL


def test_a_draft_distribution_with_fewer_tokens_than_children_does_not_change_the_distribution():
    world = random_world(Sampler(), draft_temperature=0.001)
    assert ((world.draft > 0).sum(axis=-1) < 4).mean() > 0.9  # four children of the root, often one possible token
    assert world.p_value(TREES["wide"], sampled=True) > LEVEL


def test_drafts_from_the_backbones_own_distribution_are_all_accepted():
    world = random_world(Sampler())
    world.draft, rng = world.target, np.random.default_rng(0)
    for _ in range(200):
        tokens = world.guess(TREES["chain"], (0, 0), True, rng)
        after = world.after(world.target, TREES["chain"], tokens, (0, 0))
        path, _ = verify_lossless(TREES["chain"].parents, tokens, after, rng, draft=after)
        assert path.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sampled", [False, True])
def test_at_temperature_0_only_the_most_probable_tokens_are_emitted(sampled):
    world = random_world(Sampler(0))
    counts = world.counts(TREES["default"], sampled, 300)
    first = world.target[0, 0].argmax()
    assert counts[first * VOCAB + world.target[0, first].argmax()] == 300


@pytest.mark.parametrize("tree", ["chain", "wide", "default"])
def test_control_a_rejection_that_does_not_change_p_fails(monkeypatch, tree):
    monkeypatch.setattr(verification, "_residual", lambda p, q: p)
    assert random_world(Sampler()).p_value(TREES[tree], True, CONTROL_DRAWS) < CERTAIN


def test_control_siblings_that_ignore_each_other_fail(monkeypatch):
    monkeypatch.setattr(verification, "_without", lambda q, token: q)
    assert random_world(Sampler()).p_value(TREES["wide"], True, CONTROL_DRAWS) < CERTAIN


def test_control_drafts_verified_with_another_distribution_fail():
    """Drawn without replacement, verified as if drawn from a flatter distribution."""
    world = random_world(Sampler())

    def verify(parents, tokens, target, rng, draft):
        return verify_lossless(parents, tokens, target, rng, lambda node: 0.5 * draft(node) + 0.5 / VOCAB)

    assert world.p_value(TREES["wide"], True, CONTROL_DRAWS, verify=verify) < CERTAIN


@pytest.mark.parametrize("sampled", [False, True])
def test_control_accepting_the_most_probable_token_fails(sampled):
    def verify(parents, tokens, target, rng, draft):
        best = [node for node in range(1, len(parents)) if parents[node] == 0 and tokens[node] == target(0).argmax()]
        if best:
            return np.array([0, best[0]], np.int32), int(target(best[0]).argmax())
        return verify_lossless(parents, tokens, target, rng, draft)

    assert random_world(Sampler()).p_value(TREES["wide"], sampled, CONTROL_DRAWS, verify=verify) < CERTAIN


def test_control_typical_acceptance_changes_the_distribution():
    def verify(parents, tokens, target, rng, draft):
        return verify_typical(parents, tokens, target, 0.09, 0.3, rng)

    assert random_world(Sampler()).p_value(TREES["wide"], False, CONTROL_DRAWS, verify=verify) < CERTAIN


PROMPT = [{"role": "user", "content": "Tell me about a film that you like."}]


@pytest.fixture(scope="module")
def written(tokenizer):
    """The embedded backbone after a fixed prompt, as a World: rows of one tree pass for verification.

    Its tokens are those that top-k leaves for the next three; token 0 is the root. Also returned: the exact
    distribution of the next two, from passes over the whole text without a cache or a tree.
    """
    backbone, sampler = load_backbone(dtype="float32"), Sampler(0.9, top_k=5)
    prompt = tokenizer.encode_chat(PROMPT)

    def whole(*following):
        row = backbone.forward(np.array([[*prompt, *following]], np.int32), logits="last").logits.numpy()[0]
        return sampler.probabilities(row)[0]

    first = whole()
    firsts = np.flatnonzero(first).tolist()
    after = {token: whole(token) for token in firsts}
    tree = Tree.from_paths([[i] for i in range(5)] + [[i, j] for i in range(5) for j in range(5)])
    tokens = [prompt[-1], *firsts, *(token for a in firsts for token in np.flatnonzero(after[a]).tolist())]
    with jt.no_grad():
        cache = backbone.new_cache(len(prompt) + tree.num_nodes)
        backbone.forward(np.array([prompt[:-1]], np.int32), cache=cache)
        cache.commit(np.arange(len(prompt) - 1))
        output = backbone.forward(np.array([tokens], np.int32), cache=cache, attend=tree.plan)
        logits = output.logits.numpy()[0]
    rows = sampler.probabilities(logits)
    used = [-1, *np.flatnonzero(rows.sum(axis=0)).tolist()]  # token of the tables -> the backbone's; 0: the root
    index = {token: i for i, token in enumerate(used)}
    world = World(Sampler(), *np.zeros((2, len(used), len(used), len(used))))
    guesses = np.random.default_rng(1).normal(0, 1.0, world.target.shape)
    for node, row in enumerate(rows):
        parent = tree.parents[node]
        place = (0, 0) if node == 0 else (0 if parent == 0 else index[tokens[parent]], index[tokens[node]])
        world.target[place] = np.append(0.0, row[used[1:]])
        guesses[place][1:] += logits[node][used[1:]]
    world.draft = softmax(guesses.reshape(-1, len(used)), 1.0).reshape(guesses.shape)
    world.best = np.argsort(-world.draft, axis=-1)
    exact = np.zeros((len(used), len(used)))
    for a in firsts:
        for b in np.flatnonzero(after[a]).tolist():
            exact[index[a], index[b]] = first[a] * after[a][b]
    assert exact.sum() == pytest.approx(1)
    return world, exact.reshape(-1)


@pytest.mark.parametrize(("tree", "sampled"), [("default", False), ("default", True), ("mixed", True)])
def test_tree_verification_on_the_embedded_backbone_has_its_distribution(written, tree, sampled):
    world, exact = written
    assert g_test(world.counts(TREES[tree], sampled, NUM_DRAWS), NUM_DRAWS * exact) > LEVEL


def test_control_a_wrong_residual_on_the_embedded_backbone_fails(written, monkeypatch):
    world, exact = written
    monkeypatch.setattr(verification, "_residual", lambda p, q: p)
    assert g_test(world.counts(TREES["mixed"], True, CONTROL_DRAWS), CONTROL_DRAWS * exact) < CERTAIN
