"""The gated RNN head against its equation in NumPy, and a case worked by hand."""

import math

import numpy as np
import pytest

from heads.registry import build
from tests.heads.parity import (
    DEPTHS,
    DIM,
    apart,
    array,
    close,
    draw_text,
    head_by_hand,
    logits_of,
    norm,
    parameters_of,
    read_tokens,
    run,
    sigmoid,
    silu,
    step,
)


def advance(p, state, embedding, with_gate=True):
    """u = [norm(s), norm(e)];  c = W_o (silu(W_a u + b_a) * (W_b u + b_b));  g = sigmoid(W_g u + b_g)."""
    u = np.concatenate([norm(state, p["state_norm.weight"]), norm(embedding, p["token_norm.weight"])], 1)
    inner = p["proposal_down.weight"].shape[1]
    (w_g, w_a, w_b), (b_g, b_a, b_b) = (np.split(p[f"joint.{n}"], [DIM, DIM + inner]) for n in ("weight", "bias"))
    c = (silu(u @ w_a.T + b_a) * (u @ w_b.T + b_b)) @ p["proposal_down.weight"].T
    g = sigmoid(u @ w_g.T + b_g) if with_gate else 0.5
    return g * state + (1 - g) * c


def advance_gru(p, state, embedding, with_reset=True):
    """[z; r] = sigmoid(W [n1(s); n2(e)] + b);  c = tanh(W_c [r * n1(s); n2(e)] + b_c);  s' = z * s + (1 - z) * c."""
    s, e = norm(state, p["state_norm.weight"]), norm(embedding, p["token_norm.weight"])
    gates = sigmoid(np.concatenate([s, e], 1) @ p["gates.weight"].T + p["gates.bias"])
    z, r = gates[:, :DIM], gates[:, DIM:] if with_reset else 1
    c = np.tanh(np.concatenate([r * s, e], 1) @ p["proposal.weight"].T + p["proposal.bias"])
    return z * state + (1 - z) * c


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
    hidden, ids = draw_text()
    p, lm_weight, (equation, defect) = parameters_of(head), array(backbone.lm_head_weight), CELLS[cell]
    state = wrong = hidden.astype(np.float64)
    for logits, embedded in zip(logits_of(run(head, hidden, ids)), read_tokens(backbone, ids), strict=True):
        state, wrong = equation(p, state, embedded), defect(p, wrong, embedded)
        assert close(logits, state @ lm_weight.T) and apart(logits, wrong @ lm_weight.T)


def test_depths_share_their_weights(backbone):
    counts = {build("gated_rnn", {"num_depths": n, "inner_size": 24}, backbone).num_parameters for n in (1, 5)}
    assert counts == {2 * DIM + (DIM + 2 * 24) * (2 * DIM + 1) + DIM * 24}
    counts = {build("gated_rnn", {"num_depths": n, "cell": "gru"}, backbone).num_parameters for n in (1, 5)}
    assert counts == {2 * DIM + 3 * (2 * DIM * DIM + DIM)}


def test_a_case_worked_by_hand():
    """s = (3, -3) and e = (2, 2) are normed to (1, -1) and (1, 1), so u = (1, -1, 1, 1). W_a = ((ln 3, 0, 0, 0), 0)
    gives a = (ln 3, 0) and silu(a) = (3/4 ln 3, 0); W_b = ((0, 0, 2, 0), 0) gives (2, 0); W_o = 1, so c = (3/2 ln 3,
    0). W_g = 0 and b = (ln 3, 0) give g = (3/4, 1/2), so s' = (9/4 + 3/8 ln 3, -3/2). The logits are s'_0, s'_1 and
    their sum."""
    log3 = math.log(3)
    values = {
        "joint.weight": [[0, 0, 0, 0], [0, 0, 0, 0], [log3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]],
        "joint.bias": [log3, 0, 0, 0, 0, 0],
        "proposal_down.weight": np.eye(2),
    }
    head, state = head_by_hand("gated_rnn", {"num_depths": 1, "inner_size": 2}, values)
    logits, state = step(head, state, 1)
    first = 9 / 4 + 3 / 8 * log3
    np.testing.assert_allclose(state[0].numpy(), [[first, -1.5]], atol=1e-5)
    np.testing.assert_allclose(logits, [[first, -1.5, first - 1.5]], atol=1e-5)
