"""The Hydra head against a NumPy writing of its equation: each depth is told every token drafted before it."""

import numpy as np
import pytest

from heads.base import Features
from heads.decoder import HeadCache
from heads.registry import build
from runtime import jt

ROWS, DIM, VOCAB, DEPTHS = 5, 32, 64, 3
# Logits of size 1 to 10: sums of up to 128 float32 products, a few in a row.
TOLERANCE = 1e-4


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def hydra(p, lm_weight, h, told, num_layers):
    """Logits of the depth that is told these embeddings, oldest first. h: (rows, dim); told: list of (rows, dim)."""
    depth = len(told) - 1
    x = np.concatenate([h, *[norm(e, p["token_norm.weight"]) for e in told]], 1)
    weight, bias = p[f"blocks.{depth}.0.linear.weight"], p[f"blocks.{depth}.0.linear.bias"]
    y = x @ weight[:DIM].T + bias[:DIM] + silu(x @ weight[DIM:].T + bias[DIM:])
    for layer in range(1, num_layers):
        block = f"blocks.{depth}.{layer}.linear"
        y = y + silu(y @ p[f"{block}.weight"].T + p[f"{block}.bias"])
    if f"lm_heads.{depth}.down.weight" in p:
        lm_weight = lm_weight + p[f"lm_heads.{depth}.up.weight"] @ p[f"lm_heads.{depth}.down.weight"]
    return y @ p.get(f"lm_heads.{depth}.weight", lm_weight).T


def parameters_of(head):
    return {name: parameter.numpy().astype(np.float64) for name, parameter in head.named_parameters()}


@pytest.fixture(scope="module")
def text():
    """(h (rows, dim), token ids (1, rows + depths))."""
    random = np.random.default_rng(0)
    h = random.standard_normal((ROWS, DIM)).astype(np.float32)
    return h, random.integers(0, VOCAB, (1, ROWS + DEPTHS)).astype(np.int32)


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 3), ("low_rank", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_equation(random_head, backbone, text, lm_head, num_layers, training):
    head = random_head("hydra", num_depths=DEPTHS, num_layers=num_layers, lm_head=lm_head, rank=4)
    head.train() if training else head.eval()
    h, ids = text
    logits = head(Features(jt.array(h[None])), ids, np.arange(ROWS)).logits
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    lm_weight = backbone.lm_head_weight.numpy().astype(np.float64)
    told = [embedding[ids[0, 1 + depth : 1 + depth + ROWS]] for depth in range(DEPTHS)]
    for depth in range(DEPTHS):
        expected = hydra(p, lm_weight, h, told[: depth + 1], num_layers)
        assert np.abs(logits[depth].value().numpy() - expected).max() < TOLERANCE
        late = [*told[:depth], embedding[ids[0, depth : depth + ROWS]]]  # the newest token is the one before it
        assert np.abs(logits[depth].value().numpy() - hydra(p, lm_weight, h, late, num_layers)).max() > 100 * TOLERANCE


def test_the_order_of_the_tokens_counts(random_head, text):
    head = random_head("hydra", num_depths=DEPTHS)
    head.eval()
    h, ids = text
    swapped = ids[:, [0, 2, 1, *range(3, ids.shape[1])]]  # what depth 1 of the first row is told
    forward, backward = [head(Features(jt.array(h[None])), told, np.array([0])).logits[1] for told in (ids, swapped)]
    assert np.abs(forward.value().numpy() - backward.value().numpy()).max() > 100 * TOLERANCE


@pytest.mark.parametrize("lm_head", ["own", "shared", "low_rank"])
def test_a_drafted_path_equals_the_equation(random_head, backbone, text, lm_head):
    head = random_head("hydra", num_depths=DEPTHS, num_layers=2, lm_head=lm_head, rank=4)
    head.eval()
    h, ids = text
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    lm_weight = backbone.lm_head_weight.numpy().astype(np.float64)
    state = head.begin(Features(jt.array(h[None])), jt.array(ids[:, 1 : ROWS + 1]))
    path = ids[0, ROWS : ROWS + DEPTHS]
    for depth in range(DEPTHS):
        logits, state = head.step(state, jt.array(path[depth : depth + 1]), jt.array(np.zeros(1, np.int32)))
        told = [embedding[path[k : k + 1]] for k in range(depth + 1)]
        assert np.abs(logits.numpy() - hydra(p, lm_weight, h[-1:], told, 2)).max() < TOLERANCE


@pytest.mark.parametrize("lm_head", ["own", "shared", "low_rank"])
def test_an_untrained_depth_repeats_the_backbones_next_token(backbone, text, lm_head):
    h, ids = text
    head = build("hydra", {"num_depths": DEPTHS, "num_layers": 2, "lm_head": lm_head}, backbone)
    head.eval()
    expected = h @ backbone.lm_head_weight.numpy().T
    for logits in head(Features(jt.array(h[None])), ids, np.arange(ROWS)).logits:
        assert np.abs(logits.value().numpy() - expected).max() < TOLERANCE


def test_the_number_of_parameters_is_that_of_the_readme(backbone):
    def count(**options):
        return build("hydra", {"num_depths": DEPTHS, **options}, backbone).num_parameters

    first = DIM * DIM * DEPTHS * (DEPTHS + 3) + 2 * DEPTHS * DIM + DIM
    assert first == DIM + sum(2 * ((k + 2) * DIM * DIM + DIM) for k in range(DEPTHS))
    block = DIM * DIM + DIM
    assert count(num_layers=3) == first + DEPTHS * (2 * block + VOCAB * DIM)
    assert count(lm_head="shared") == first
    assert count(lm_head="low_rank", rank=4) == first + DEPTHS * 4 * (VOCAB + DIM)


def test_layers_of_a_depth_have_weights_of_their_own(backbone):
    head = build("hydra", {"num_depths": 2, "num_layers": 3}, backbone)
    assert len({id(p) for p in head.parameters()}) == 1 + 2 * (3 * 2 + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_head": "mine"}, "lm_head must be one of own, shared, low_rank, got 'mine'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"lm_head": "low_rank", "rank": 0}, "rank must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_head_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        build("hydra", options, backbone)


def test_a_draft_deeper_than_the_head_fails(random_head, text):
    head = random_head("hydra", num_depths=1)
    head.eval()
    h, ids = text
    root = jt.array(np.zeros(1, np.int32))
    _, state = head.step(head.begin(Features(jt.array(h[None])), jt.array(ids[:, 1:])), root, root)
    with pytest.raises(IndexError):
        head.step(state, root, root)


def test_the_prefix_layer_feeds_every_depth_and_keeps_to_its_sequence(random_head, backbone, text):
    """Hydra++: h' is the decoder layer's output over n_p(h). The layer itself is held to NumPy with the EAGLE heads."""
    head = random_head("hydra", num_depths=DEPTHS, prefix_layer=True)
    head.eval()
    h, ids = text
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    lm_weight = backbone.lm_head_weight.numpy().astype(np.float64)
    first = ROWS - 2  # two sequences: what the second one's rows see starts there
    features, positions = Features(jt.array(h[None]), {}, (first, 2)), np.arange(ROWS)
    logits = head(features, ids, positions).logits
    normed = head.prefix_norm(jt.array(h))
    parts = []
    for rows in (slice(0, first), slice(first, ROWS)):
        cache = HeadCache(head.prefix)
        parts += [
            head.prefix.extend(cache, jt.array(h[t : t + 1]), normed[t : t + 1]).numpy()
            for t in range(rows.start, rows.stop)
        ]
    prefixed = np.concatenate(parts).astype(np.float64)
    told = [embedding[ids[0, 1 + k : 1 + k + ROWS]] for k in range(DEPTHS)]
    for depth in range(DEPTHS):
        expected = hydra(p, lm_weight, prefixed, told[: depth + 1], 1)
        assert np.abs(logits[depth].value().numpy() - expected).max() < TOLERANCE
        plain = hydra(p, lm_weight, h.astype(np.float64), told[: depth + 1], 1)
        assert np.abs(logits[depth].value().numpy() - plain).max() > 100 * TOLERANCE


def test_the_prefix_layer_adds_one_decoder_layer(backbone):
    plain, prefixed = (build("hydra", {"prefix_layer": given}, backbone).num_parameters for given in (False, True))
    c = backbone.config
    attention = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * DIM
    assert prefixed - plain == 2 * DIM + attention + 3 * DIM * c.intermediate_size


def test_a_draft_vocabulary_keeps_the_most_frequent_tokens_and_their_rows(backbone, text):
    counts = np.zeros(VOCAB, np.int64)
    counts[[40, 3, 17, 60]] = [9, 5, 7, 7]
    head = build("hydra", {"num_depths": 2, "draft_vocab_size": 3}, backbone)
    whole = build("hydra", {"num_depths": 2}, backbone)
    assert whole.draft_vocab is None and head.num_draftable == 3
    assert whole.num_parameters - head.num_parameters == 2 * (VOCAB - 3) * DIM
    head.prepare(counts)
    assert head.draft_vocab.tolist() == [17, 40, 60]
    for depth in range(2):
        rows = backbone.lm_head_weight.numpy()[[17, 40, 60]]
        np.testing.assert_array_equal(head.lm_heads[depth].weight.numpy(), rows)
    assert "drafted" in dict(head.named_parameters()) and "drafted" not in head.trainable()
    h, ids = text
    logits, full = (
        each(Features(jt.array(h[None])), ids[:, : ROWS + 2], np.arange(ROWS)).logits[1].value().numpy()
        for each in (head, whole)
    )
    np.testing.assert_allclose(logits, full[:, [17, 40, 60]], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size must be from 0 to {VOCAB}, got {VOCAB + 1}"),
        ({"draft_vocab_size": 8, "lm_head": "shared"}, "draft_vocab_size 8 needs lm_head own, got shared"),
    ],
)
def test_a_draft_vocabulary_that_makes_no_head_is_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        build("hydra", options, backbone)
