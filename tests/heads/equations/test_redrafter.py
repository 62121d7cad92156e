"""The ReDrafter head against its equation in NumPy, and a case worked by hand."""

import math

import numpy as np
import pytest

from heads.registry import build
from tests.heads.parity import (
    DEPTHS,
    DIM,
    ROWS,
    VOCAB,
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
    silu,
    step,
)


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


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_equation(random_head, backbone, lm_head, num_layers, training):
    head = random_head("redrafter", num_depths=DEPTHS, num_layers=num_layers, lm_head=lm_head)
    head.train() if training else head.eval()
    h, ids = draw_text()
    p, lm_weight = parameters_of(head), None if lm_head == "own" else array(backbone.lm_head_weight)
    s = forgetful = np.zeros((ROWS, DIM))
    embedded = read_tokens(backbone, ids)
    for depth, found in enumerate(logits_of(run(head, h, ids))):
        s, forgetful = advance(p, s, embedded[depth]), advance(p, forgetful, embedded[depth], recurrent=False)
        assert close(found, score(p, h, s, num_layers, lm_weight))
        if depth > 0:  # s_0 = 0, so U does nothing before
            assert apart(found, score(p, h, forgetful, num_layers, lm_weight))
        assert apart(found, score(p, 0 * h, s, num_layers, lm_weight))


def test_depths_share_their_weights_and_their_number_is_that_of_the_readme(backbone):
    def count(**options):
        return build("redrafter", options, backbone).num_parameters

    recurrence, block = 2 * DIM * DIM + 2 * DIM, 4 * DIM * DIM + 2 * DIM
    for depths in (1, 5):
        assert count(num_depths=depths, num_layers=3) == recurrence + 3 * block + 2 * DIM * VOCAB
        assert count(num_depths=depths, lm_head="shared") == recurrence + block + 2 * DIM * DIM


def test_a_case_worked_by_hand():
    """e = (2, 2) is normed to (1, 1). W = ((ln 3, 0), (0, 0)), U = ((0, 1), (0, 0)) and b = (0, ln 3): W n(e) + b = (ln
    3, ln 3), so s_1 = (a, a) with a = 3/4 ln 3. The next token is the same, so s_2 = SiLU((ln 3 + a, ln 3)) = (c, a).
    Blocks are zero; V = ((1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)) gives (h_0, h_1 + s_0, s_1) with h = (3, -3): (3, -3
    + a, a), then (3, -3 + c, a)."""
    log3 = math.log(3)
    values = {
        "recurrence.weight": [[log3, 0, 0, 1], [0, 0, 0, 0]],
        "recurrence.bias": [0, log3],
        "output.weight": [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
    }
    head, state = head_by_hand("redrafter", {"num_depths": 2}, values)
    a = 0.75 * log3
    for second in (-3 + a, -3 + (log3 + a) / (1 + math.exp(-log3 - a))):
        logits, state = step(head, state, 1)
        np.testing.assert_allclose(logits, [[3, second, a]], atol=1e-5)
