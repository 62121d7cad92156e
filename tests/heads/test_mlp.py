"""The MLP head is Medusa-1: a NumPy writing of its equation, and a case worked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from heads.base import Features
from heads.registry import build
from ops.linear import PackedLinear
from runtime import jt

ROWS, DIM = 5, 32
# Logits of size 1 to 10: sums of 32 float32 products, a few in a row.
TOLERANCE = 1e-4


def silu(x):
    return x / (1 + np.exp(-x))


def medusa(parameters, x, depth, num_layers, lm_weight):
    """Medusa (arXiv 2401.10774, section 2.1): softmax(W2 (SiLU(W1 h) + h)), here with a bias and layers in a row;
    low_rank: W2 = the backbone's + B A."""
    for layer in range(num_layers):
        weight = parameters[f"blocks.{depth}.{layer}.linear.weight"]
        bias = parameters[f"blocks.{depth}.{layer}.linear.bias"]
        x = x + silu(x @ weight.T + bias)
    if f"lm_heads.{depth}.up.weight" in parameters:
        lm_weight = lm_weight + parameters[f"lm_heads.{depth}.up.weight"] @ parameters[f"lm_heads.{depth}.down.weight"]
    return x @ parameters.get(f"lm_heads.{depth}.weight", lm_weight).T


def parameters_of(head):
    return {name: parameter.numpy().astype(np.float64) for name, parameter in head.named_parameters()}


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 2), ("low_rank", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_published_equation(random_head, backbone, lm_head, num_layers, training):
    head = random_head("mlp", num_depths=3, num_layers=num_layers, lm_head=lm_head, rank=4)
    head.train() if training else head.eval()
    x = np.random.default_rng(0).standard_normal((1, ROWS, DIM)).astype(np.float32)
    logits = head(Features(jt.array(x)), np.zeros((1, ROWS + 3), np.int32), np.arange(ROWS)).logits
    parameters, lm_weight = parameters_of(head), backbone.lm_head_weight.numpy()
    for depth in range(3):
        expected = medusa(parameters, x[0], depth, num_layers, lm_weight)
        assert np.abs(logits[depth].value().numpy() - expected).max() < TOLERANCE
        swapped = medusa(parameters, x[0], (depth + 1) % 3, num_layers, lm_weight)
        assert np.abs(logits[depth].value().numpy() - swapped).max() > 100 * TOLERANCE


def test_a_correction_of_low_rank_counts(random_head, backbone):
    head = random_head("mlp", num_depths=2, lm_head="low_rank", rank=4)
    x = np.random.default_rng(0).standard_normal((ROWS, DIM))
    parameters, lm_weight = parameters_of(head), backbone.lm_head_weight.numpy()
    without = {name: value for name, value in parameters.items() if "lm_heads" not in name}
    assert np.abs(medusa(parameters, x, 0, 1, lm_weight) - medusa(without, x, 0, 1, lm_weight)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("lm_head", ["shared", "low_rank"])
def test_all_depths_at_once_are_the_depths_one_by_one(random_head, backbone, lm_head):
    head = random_head("mlp", num_depths=3, lm_head=lm_head, rank=4)
    head.eval()
    x = np.random.default_rng(0).standard_normal((1, ROWS, DIM)).astype(np.float32)
    state = head.begin(Features(jt.array(x)), jt.array(np.zeros((1, ROWS), np.int32)))
    for num_depths in (1, 3):
        expected = [medusa(parameters_of(head), x[0, -1:], k, 1, backbone.lm_head_weight.numpy()) for k in range(3)]
        found = head.score_depths(state, num_depths).numpy()
        assert found.shape == (num_depths, 64)
        assert np.abs(found - np.concatenate(expected[:num_depths])).max() < TOLERANCE


def test_an_untrained_depth_repeats_the_backbones_next_token(backbone):
    x = np.random.default_rng(0).standard_normal((1, ROWS, DIM)).astype(np.float32)
    expected = x[0] @ backbone.lm_head_weight.numpy().T
    for lm_head in ("own", "shared", "low_rank"):
        head = build("mlp", {"num_depths": 2, "lm_head": lm_head}, backbone)
        head.eval()
        for logits in head(Features(jt.array(x)), np.zeros((1, ROWS + 2), np.int32), np.arange(ROWS)).logits:
            assert np.abs(logits.value().numpy() - expected).max() < TOLERANCE


def test_the_number_of_parameters_is_that_of_the_equation(backbone):
    block = DIM * DIM + DIM
    assert build("mlp", {"num_depths": 3, "num_layers": 2}, backbone).num_parameters == 3 * (2 * block + 64 * DIM)
    assert build("mlp", {"num_depths": 3, "lm_head": "shared"}, backbone).num_parameters == 3 * block
    low_rank = build("mlp", {"num_depths": 3, "lm_head": "low_rank", "rank": 4}, backbone)
    assert low_rank.num_parameters == 3 * (block + 4 * (64 + DIM))


def test_layers_of_a_depth_have_weights_of_their_own(backbone):
    head = build("mlp", {"num_depths": 2, "num_layers": 3}, backbone)
    assert len({id(p) for p in head.parameters()}) == 2 * (3 * 2 + 1)


def test_a_case_worked_by_hand():
    """Two coordinates, three tokens, x = (1, 2). A = 0 and b = (ln 3, 0), so A x + b = (ln 3, 0) and, with
    sigmoid(ln 3) = 3/4, y = (1 + 3/4 ln 3, 2). W = ((1, 0), (0, 1), (1, 1)) gives (y_0, y_1, y_0 + y_1)."""
    weight = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    fake = SimpleNamespace(
        config=SimpleNamespace(hidden_size=2, vocab_size=3),
        lm_head_weight=jt.array(weight),
        lm_logits=PackedLinear(weight),
    )
    head = build("mlp", {"num_depths": 1}, fake)
    dict(head.named_parameters())["blocks.0.0.linear.bias"].update(jt.array(np.array([math.log(3), 0], np.float32)))
    head.eval()
    state = head.begin(
        Features(jt.array(np.array([[[9, 9], [1, 2]]], np.float32))), jt.array(np.zeros((1, 2), np.int32))
    )
    first = 1 + 0.75 * math.log(3)
    np.testing.assert_allclose(head.score_depths(state, 1).numpy(), [[first, 2, first + 2]], atol=1e-6)


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
        build("mlp", options, backbone)
