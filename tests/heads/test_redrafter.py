"""The ReDrafter head against a NumPy writing of its equation, and a case worked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from heads.base import Features
from heads.registry import build
from ops.linear import PackedLinear
from runtime import jt

ROWS, DIM, VOCAB, DEPTHS = 5, 32, 64, 3
# Logits of size 1 to 10: sums of 64 float32 products, a few in a row for each depth.
TOLERANCE = 1e-4


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def advance(p, s, embedding, recurrent=True):
    """s' = SiLU(W n(e) + U s + b), the parameter being [W U]; without ``recurrent``, U = 0."""
    w, u = p["recurrence.weight"][:, :DIM], p["recurrence.weight"][:, DIM:]
    return silu(norm(embedding, p["token_norm.weight"]) @ w.T + recurrent * (s @ u.T) + p["recurrence.bias"])


def score(p, h, s, num_layers, lm_weight):
    """V (residual blocks of [h; s]); lm_weight: the backbone's where V projects to the backbone's own space."""
    y = np.concatenate([h, s], 1)
    for layer in range(num_layers):
        y = y + silu(y @ p[f"blocks.{layer}.linear.weight"].T + p[f"blocks.{layer}.linear.bias"])
    logits = y @ p["output.weight"].T
    return logits if lm_weight is None else logits @ lm_weight.T


def parameters_of(head):
    return {name: parameter.numpy().astype(np.float64) for name, parameter in head.named_parameters()}


def lm_weight_of(backbone, lm_head):
    return None if lm_head == "own" else backbone.lm_head_weight.numpy().astype(np.float64)


@pytest.fixture(scope="module")
def text():
    """(h (rows, dim), token ids (1, rows + depths))."""
    random = np.random.default_rng(0)
    h = random.standard_normal((ROWS, DIM)).astype(np.float32)
    return h, random.integers(0, VOCAB, (1, ROWS + DEPTHS)).astype(np.int32)


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_equation(random_head, backbone, text, lm_head, num_layers, training):
    head = random_head("redrafter", num_depths=DEPTHS, num_layers=num_layers, lm_head=lm_head)
    head.train() if training else head.eval()
    h, ids = text
    logits = head(Features(jt.array(h[None])), ids, np.arange(ROWS)).logits
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    lm_weight = lm_weight_of(backbone, lm_head)
    s = forgetful = np.zeros((ROWS, DIM))
    for depth in range(DEPTHS):
        told = embedding[ids[0, 1 + depth : 1 + depth + ROWS]]
        s, forgetful = advance(p, s, told), advance(p, forgetful, told, recurrent=False)
        found = logits[depth].value().numpy()
        assert np.abs(found - score(p, h, s, num_layers, lm_weight)).max() < TOLERANCE
        if depth > 0:  # s_0 = 0, so U does nothing before
            assert np.abs(found - score(p, h, forgetful, num_layers, lm_weight)).max() > 100 * TOLERANCE
        assert np.abs(found - score(p, 0 * h, s, num_layers, lm_weight)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_a_drafted_path_equals_the_equation(random_head, backbone, text, lm_head):
    head = random_head("redrafter", num_depths=DEPTHS, num_layers=2, lm_head=lm_head)
    head.eval()
    h, ids = text
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    state = head.begin(Features(jt.array(h[None])), jt.array(ids[:, 1 : ROWS + 1]))
    s = np.zeros((1, DIM))
    for token in ids[0, ROWS : ROWS + DEPTHS]:
        logits, state = head.step(state, jt.array(np.array([token], np.int32)), jt.array(np.zeros(1, np.int32)))
        s = advance(p, s, embedding[[token]])
        expected = score(p, h[-1:], s, 2, lm_weight_of(backbone, lm_head))
        assert np.abs(logits.numpy() - expected).max() < TOLERANCE


@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_an_untrained_depth_repeats_the_backbones_next_token(backbone, text, lm_head):
    h, ids = text
    head = build("redrafter", {"num_depths": DEPTHS, "num_layers": 2, "lm_head": lm_head}, backbone)
    head.eval()
    expected = h @ backbone.lm_head_weight.numpy().T
    for logits in head(Features(jt.array(h[None])), ids, np.arange(ROWS)).logits:
        assert np.abs(logits.value().numpy() - expected).max() < TOLERANCE


def test_depths_share_their_weights_and_their_number_is_that_of_the_readme(backbone):
    def count(**options):
        return build("redrafter", options, backbone).num_parameters

    recurrence, block = 2 * DIM * DIM + 2 * DIM, 4 * DIM * DIM + 2 * DIM
    for depths in (1, 5):
        assert count(num_depths=depths, num_layers=3) == recurrence + 3 * block + 2 * DIM * VOCAB
        assert count(num_depths=depths, lm_head="shared") == recurrence + block + 2 * DIM * DIM


def test_layers_have_weights_of_their_own(backbone):
    head = build("redrafter", {"num_layers": 3}, backbone)
    assert len({id(p) for p in head.parameters()}) == 3 + 3 * 2 + 1


def test_a_case_worked_by_hand():
    """Two coordinates and three tokens. e = (2, 2) is normed to (1, 1). W = ((ln 3, 0), (0, 0)), U = ((0, 1), (0, 0))
    and b = (0, ln 3): W n(e) + b = (ln 3, ln 3), so s_1 = (a, a) with a = 3/4 ln 3. The next token is the same, so
    s_2 = SiLU((ln 3 + a, ln 3)) = (c, a). Blocks are zero; V = ((1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)) gives
    (h_0, h_1 + s_0, s_1) with h = (3, -3): (3, -3 + a, a), then (3, -3 + c, a)."""
    weight = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    fake = SimpleNamespace(
        config=SimpleNamespace(hidden_size=2, vocab_size=3),
        embed=lambda ids: jt.array(np.array([[5, 1], [2, 2], [0, 7]], np.float32))[ids],
        lm_head_weight=jt.array(weight),
        lm_logits=PackedLinear(weight),
    )
    head = build("redrafter", {"num_depths": 2}, fake)
    log3 = math.log(3)
    values = {
        "recurrence.weight": [[log3, 0, 0, 1], [0, 0, 0, 0]],
        "recurrence.bias": [0, log3],
        "output.weight": [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
    }
    parameters = dict(head.named_parameters())
    for name, value in values.items():
        parameters[name].update(jt.array(np.array(value, np.float32)))
    head.eval()
    hidden = jt.array(np.array([[[7, 7], [3, -3]]], np.float32))
    state = head.begin(Features(hidden), jt.array(np.array([[0, 1]], np.int32)))
    a = 0.75 * log3
    for second in (-3 + a, -3 + (log3 + a) / (1 + math.exp(-log3 - a))):
        logits, state = head.step(state, jt.array(np.array([1], np.int32)), jt.array(np.zeros(1, np.int32)))
        np.testing.assert_allclose(logits.numpy(), [[3, second, a]], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_head": "low_rank"}, "lm_head must be one of own, shared, got 'low_rank'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_head_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        build("redrafter", options, backbone)
