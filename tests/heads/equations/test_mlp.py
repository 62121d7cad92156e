"""The MLP head is Medusa-1: its equation in NumPy, and a case worked by hand."""

import math

import numpy as np
import pytest

from heads.registry import build
from tests.heads.parity import (
    DEPTHS,
    DIM,
    VOCAB,
    apart,
    close,
    draw_text,
    head_by_hand,
    lm_weight_of,
    logits_of,
    parameters_of,
    run,
    silu,
)


def medusa(p, x, depth, num_layers, lm_weight):
    """Medusa (arXiv 2401.10774, section 2.1): softmax(W2 (SiLU(W1 h) + h)), here with a bias and several layers."""
    for layer in range(num_layers):
        weight, bias = (p[f"blocks.{depth}.{layer}.linear.{part}"] for part in ("weight", "bias"))
        x = x + silu(x @ weight.T + bias)
    return x @ lm_weight.T


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 2), ("low_rank", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_published_equation(random_head, backbone, lm_head, num_layers, training):
    head = random_head("mlp", num_depths=DEPTHS, num_layers=num_layers, lm_head=lm_head, rank=4)
    head.train() if training else head.eval()
    x, ids = draw_text()
    p = parameters_of(head)
    for depth, logits in enumerate(logits_of(run(head, x, ids))):
        lm_weight = lm_weight_of(p, depth, backbone)
        assert close(logits, medusa(p, x, depth, num_layers, lm_weight))
        assert apart(logits, medusa(p, x, (depth + 1) % DEPTHS, num_layers, lm_weight))
        if lm_head == "low_rank":
            assert apart(logits, medusa(p, x, depth, num_layers, lm_weight_of({}, depth, backbone)))


def test_the_number_of_parameters_is_that_of_the_equation(backbone):
    block = DIM * DIM + DIM
    for lm_head, own in (("own", VOCAB * DIM), ("shared", 0), ("low_rank", 4 * (VOCAB + DIM))):
        head = build("mlp", {"num_depths": 3, "num_layers": 2, "lm_head": lm_head, "rank": 4}, backbone)
        assert head.num_parameters == 3 * (2 * block + own)


def test_a_case_worked_by_hand():
    """x = (3, -3). A = 0 and b = (ln 3, 0), so A x + b = (ln 3, 0) and, with sigmoid(ln 3) = 3/4,
    y = (3 + 3/4 ln 3, -3). The logits are y_0, y_1 and their sum."""
    head, state = head_by_hand("mlp", {"num_depths": 1}, {"blocks.0.0.linear.bias": [math.log(3), 0]})
    first = 3 + 0.75 * math.log(3)
    np.testing.assert_allclose(head.score_depths(state, 1).numpy(), [[first, -3, first - 3]], atol=1e-6)
