"""The gated RNN head against a NumPy writing of its equation, and a case worked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from heads.base import Features
from heads.registry import build
from ops.linear import PackedLinear
from runtime import jt

ROWS, DIM, DEPTHS = 5, 32, 3
# Logits of size 1 to 10: sums of 64 float32 products, a few in a row for each depth.
TOLERANCE = 1e-4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def advance(p, state, embedding, with_gate=True):
    """u = [norm(s), norm(e)];  c = W_o (silu(W_a u + b_a) * (W_b u + b_b));  g = sigmoid(W_g u + b_g)."""
    u = np.concatenate([norm(state, p["state_norm.weight"]), norm(embedding, p["token_norm.weight"])], 1)
    inner = p["proposal_down.weight"].shape[1]
    (w_g, w_a, w_b), (b_g, b_a, b_b) = (np.split(p[f"joint.{n}"], [DIM, DIM + inner]) for n in ("weight", "bias"))
    a = u @ w_a.T + b_a
    c = (a * sigmoid(a) * (u @ w_b.T + b_b)) @ p["proposal_down.weight"].T
    g = sigmoid(u @ w_g.T + b_g) if with_gate else 0.5
    return g * state + (1 - g) * c


def advance_gru(p, state, embedding, with_reset=True):
    """[z; r] = sigmoid(W [n1(s); n2(e)] + b);  c = tanh(W_c [r * n1(s); n2(e)] + b_c);  s' = z * s + (1 - z) * c."""
    s, e = norm(state, p["state_norm.weight"]), norm(embedding, p["token_norm.weight"])
    gates = sigmoid(np.concatenate([s, e], 1) @ p["gates.weight"].T + p["gates.bias"])
    z, r = gates[:, :DIM], gates[:, DIM:] if with_reset else 1
    c = np.tanh(np.concatenate([r * s, e], 1) @ p["proposal.weight"].T + p["proposal.bias"])
    return z * state + (1 - z) * c


def parameters_of(head):
    return {name: parameter.numpy().astype(np.float64) for name, parameter in head.named_parameters()}


# Each cell's equation, and the same with a part left out.
CELLS = {
    "gated": (advance, lambda *given: advance(*given, with_gate=False)),
    "gru": (advance_gru, lambda *given: advance_gru(*given, with_reset=False)),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_equation(random_head, backbone, cell, training):
    head = random_head("gated_rnn", num_depths=DEPTHS, inner_size=24, cell=cell)
    head.train() if training else head.eval()
    random = np.random.default_rng(0)
    x = random.standard_normal((1, ROWS, DIM)).astype(np.float32)
    ids = random.integers(0, 64, (1, ROWS + DEPTHS)).astype(np.int32)
    logits = head(Features(jt.array(x)), ids, np.arange(ROWS)).logits
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    lm_weight = backbone.lm_head_weight.numpy().astype(np.float64)
    equation, defect = CELLS[cell]
    state, wrong = x[0].astype(np.float64), x[0].astype(np.float64)
    for depth in range(DEPTHS):
        told = embedding[ids[0, 1 + depth : 1 + depth + ROWS]]
        state, wrong = equation(p, state, told), defect(p, wrong, told)
        assert np.abs(logits[depth].value().numpy() - state @ lm_weight.T).max() < TOLERANCE
        assert np.abs(logits[depth].value().numpy() - wrong @ lm_weight.T).max() > 100 * TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_a_drafted_path_equals_the_equation(random_head, backbone, cell):
    head = random_head("gated_rnn", num_depths=DEPTHS, inner_size=24, cell=cell)
    head.eval()
    x = np.random.default_rng(0).standard_normal((1, ROWS, DIM)).astype(np.float32)
    p, embedding = parameters_of(head), backbone.embedding.numpy().astype(np.float64)
    expected = x[0, -1:].astype(np.float64)
    state = head.begin(Features(jt.array(x)), jt.array(np.zeros((1, ROWS), np.int32)))
    for token in (7, 11, 7):
        logits, state = head.step(state, jt.array(np.array([token], np.int32)), jt.array(np.zeros(1, np.int32)))
        expected = CELLS[cell][0](p, expected, embedding[[token]])
        assert np.abs(logits.numpy() - expected @ backbone.lm_head_weight.numpy().T).max() < TOLERANCE


def test_depths_share_their_weights(backbone):
    counts = {build("gated_rnn", {"num_depths": n, "inner_size": 24}, backbone).num_parameters for n in (1, 5)}
    assert counts == {2 * DIM + (DIM + 2 * 24) * (2 * DIM + 1) + DIM * 24}
    counts = {build("gated_rnn", {"num_depths": n, "cell": "gru"}, backbone).num_parameters for n in (1, 5)}
    assert counts == {2 * DIM + 3 * (2 * DIM * DIM + DIM)}


def test_a_case_worked_by_hand():
    """Two coordinates and three tokens. s = (3, -3) and e = (2, 2) are normed to (1, -1) and (1, 1), so
    u = (1, -1, 1, 1). W_a = ((ln 3, 0, 0, 0), 0) gives a = (ln 3, 0) and silu(a) = (3/4 ln 3, 0); W_b = ((0, 0, 2, 0),
    0) gives (2, 0); W_o = 1, so c = (3/2 ln 3, 0). W_g = 0 and b = (ln 3, 0) give g = (3/4, 1/2), so
    s' = (9/4 + 3/8 ln 3, -3/2). The language-model head ((1, 0), (0, 1), (1, 1)) gives (s'_0, s'_1, s'_0 + s'_1)."""
    weight = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    fake = SimpleNamespace(
        config=SimpleNamespace(hidden_size=2, vocab_size=3),
        embed=lambda ids: jt.array(np.array([[5, 1], [2, 2], [0, 7]], np.float32))[ids],
        lm_head_weight=jt.array(weight),
        lm_logits=PackedLinear(weight),
    )
    head = build("gated_rnn", {"num_depths": 1, "inner_size": 2}, fake)
    log3 = math.log(3)
    values = {
        "joint.weight": [[0, 0, 0, 0], [0, 0, 0, 0], [log3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]],
        "joint.bias": [log3, 0, 0, 0, 0, 0],
        "proposal_down.weight": np.eye(2),
        "state_norm.weight": [1, 1],
        "token_norm.weight": [1, 1],
    }
    parameters = dict(head.named_parameters())
    assert parameters.keys() == values.keys()
    for name, value in values.items():
        parameters[name].update(jt.array(np.array(value, np.float32)))
    head.eval()
    hidden = jt.array(np.array([[[7, 7], [3, -3]]], np.float32))
    state = head.begin(Features(hidden), jt.array(np.array([[0, 1]], np.int32)))
    logits, state = head.step(state, jt.array(np.array([1], np.int32)), jt.array(np.zeros(1, np.int32)))
    first = 9 / 4 + 3 / 8 * log3
    np.testing.assert_allclose(state[0].numpy(), [[first, -1.5]], atol=1e-5)
    np.testing.assert_allclose(logits.numpy(), [[first, -1.5, first - 1.5]], atol=1e-5)


def test_a_width_below_one_is_refused(backbone):
    with pytest.raises(ValueError, match="inner_size must be at least 1, got 0"):
        build("gated_rnn", {"inner_size": 0}, backbone)


def test_an_unknown_cell_is_refused(backbone):
    with pytest.raises(ValueError, match="cell must be one of gated, gru, got 'lstm'"):
        build("gated_rnn", {"cell": "lstm"}, backbone)
