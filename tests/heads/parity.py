"""What the NumPy equations of the heads share, and heads small enough to test."""

import dataclasses
from types import SimpleNamespace

import numpy as np

from heads.base import Features, Projection
from heads.registry import build, head_class
from ops.linear import PackedLinear
from runtime import jt

ROWS, DIM, VOCAB, DEPTHS = 5, 32, 64, 3
# Logits of size 1 to 30 in float32: sums of 32 to 128 products, a few in a row for each depth.
TOLERANCE = 1e-4

# Options that make a head small, where it has them.
SMALL = {"num_depths": DEPTHS, "inner_size": 24, "hidden_size": 24, "rank": 4, "num_experts": 3, "adapter_rank": 4}


def small_options(name):
    """Those of SMALL that this head has."""
    known = {field.name for field in dataclasses.fields(head_class(name).Config)}
    return {key: value for key, value in SMALL.items() if key in known}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def array(var):
    return var.numpy().astype(np.float64)


def parameters_of(head):
    """A head's parameters by name, float64."""
    return {name: array(parameter) for name, parameter in head.named_parameters()}


def draw_text(rows=ROWS, depths=DEPTHS):
    """Hidden states (rows, dim) and token ids (1, rows + depths)."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((rows, DIM)).astype(np.float32)
    return hidden, random.integers(0, VOCAB, (1, rows + depths)).astype(np.int32)


def read_tokens(backbone, ids, rows=ROWS, depths=DEPTHS):
    """The embeddings (rows, dim) that each depth reads; ids: (1, rows + depths)."""
    return [array(backbone.embedding)[ids[0, 1 + depth : 1 + depth + rows]] for depth in range(depths)]


def logits_of(output):
    """The logits of every depth, (positions, vocab) each."""
    return [(each.value() if isinstance(each, Projection) else each).numpy() for each in output.logits]


def run(head, hidden, ids, lengths=None):
    """The head's output at every position of one row of the batch. hidden: (rows, dim)."""
    return head(Features(jt.array(hidden[None]), lengths=lengths), ids, np.arange(len(hidden)))


def lm_weight_of(p, depth, backbone):
    """The language-model head of a depth of ``DepthLMHeads``, (vocab, dim): own, shared or with a correction."""
    weight = array(backbone.lm_head_weight)
    if f"lm_heads.{depth}.up.weight" in p:
        weight = weight + p[f"lm_heads.{depth}.up.weight"] @ p[f"lm_heads.{depth}.down.weight"]
    return p.get(f"lm_heads.{depth}.weight", weight)


def close(found, expected):
    return np.abs(found - expected).max() < TOLERANCE


def apart(found, expected):
    """A control: the difference is far beyond rounding."""
    return np.abs(found - expected).max() > 100 * TOLERANCE


def head_by_hand(name, options, values):
    """A head with these parameters on a backbone of two coordinates and three tokens, token 1 embedded as (2, 2), whose
    language-model head is ((1, 0), (0, 1), (1, 1)); and its state after rows (7, 7) and (3, -3) with root 1."""
    weight = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    backbone = SimpleNamespace(
        config=SimpleNamespace(hidden_size=2, vocab_size=3),
        embed=lambda ids: jt.array(np.array([[5, 1], [2, 2], [0, 7]], np.float32))[ids],
        lm_head_weight=jt.array(weight),
        lm_logits=PackedLinear(weight),
    )
    head = build(name, options, backbone)
    parameters = dict(head.named_parameters())
    for key, value in values.items():
        parameters[key].update(jt.array(np.array(value, np.float32)))
    head.eval()
    hidden = jt.array(np.array([[[7, 7], [3, -3]]], np.float32))
    return head, head.begin(Features(hidden), jt.array(np.array([[0, 1]], np.int32)))


def step(head, state, token):
    """Logits (1, vocab) after one more token, and the state."""
    logits, state = head.step(state, jt.array(np.array([token], np.int32)), jt.array(np.zeros(1, np.int32)))
    return logits.numpy(), state
