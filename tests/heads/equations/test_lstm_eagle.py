"""The LSTM head and its feature loss against their equations in NumPy, and the shared parts by hand."""

import numpy as np
import pytest

from heads.base import Features
from heads.layers import later_positions, smooth_l1
from heads.registry import build
from runtime import jt
from tests.heads.parity import DEPTHS, DIM, apart, array, close, norm, parameters_of, sigmoid

ROWS, SIZE, WEIGHT = 9, 24, 2.5


def unroll(p, feature, embeddings, with_memory=True):
    """The features that the LSTM predicts one after another: f' = f + W_o h', h' = o * tanh(c'),
    c' = forget * c + i * tanh(g), all gates from [n1(f); n2(e); h], c_0 = W_c n1(f_0), h_0 = 0."""
    h = np.zeros((len(feature), SIZE))
    c = norm(feature, p["feature_norm.weight"]) @ p["cell_start.weight"].T
    predicted = []
    for e in embeddings:
        x = np.concatenate([norm(feature, p["feature_norm.weight"]), norm(e, p["token_norm.weight"]), h], 1)
        i, g, forget, o = np.split(x @ p["gates.weight"].T + p["gates.bias"], 4, 1)
        c = sigmoid(forget) * c * with_memory + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        feature = feature + h @ p["output.weight"].T
        predicted.append(feature)
    return predicted


def feature_loss(predicted, hidden, positions, lengths, past_the_end=False):
    """Mean over depths of SmoothL1 against the true feature k + 1 rows later, position by position."""
    sequence_of = np.repeat(np.arange(len(lengths)), lengths)
    means = []
    for depth, guess in enumerate(predicted):
        rows = []
        for row, position in enumerate(positions):
            later = position + depth + 1
            same = later < len(hidden) and (past_the_end or sequence_of[later] == sequence_of[position])
            if same:
                d = np.abs(guess[row] - hidden[later])
                rows.append(np.where(d < 1, d**2 / 2, d - 0.5))
        means.append(np.mean(rows) if rows else 0.0)
    return np.mean(means)


# One row of packed sequences, one of them shorter than the draft; two rows of one sequence each.
@pytest.mark.parametrize(("batch", "lengths"), [(1, (5, 1, 3)), (2, None)])
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_feature_loss_are_those_of_the_equation(random_head, backbone, training, batch, lengths):
    head = random_head("lstm_eagle", num_depths=DEPTHS, hidden_size=SIZE, feature_weight=WEIGHT)
    head.train() if training else head.eval()
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, ROWS, DIM)).astype(np.float32)
    ids = random.integers(0, 64, (batch, ROWS + DEPTHS)).astype(np.int32)
    positions = np.array([0, 1, 3, 4, 5, 6, 8] if batch == 1 else [0, 5, 6, 7, 8, 9, 15, 17], np.int32)
    output = head(Features(jt.array(x), lengths=lengths), ids, positions)

    p, flat = parameters_of(head), x.reshape(-1, DIM).astype(np.float64)
    embedding, lm_weight = array(backbone.embedding), array(backbone.lm_head_weight)
    embedded = [embedding[[ids[n // ROWS, n % ROWS + 1 + k] for n in positions]] for k in range(DEPTHS)]
    predicted, forgetful = (unroll(p, flat[positions], embedded, memory) for memory in (True, False))
    for depth in range(DEPTHS):
        logits = output.logits[depth].value().numpy()
        assert close(logits, predicted[depth] @ lm_weight.T) and apart(logits, forgetful[depth] @ lm_weight.T)

    (loss,) = (term.item() for term in output.aux.values())
    lengths = lengths or [ROWS] * batch
    expected = WEIGHT * feature_loss(predicted, flat, positions, lengths)
    # A mean of a few hundred float32 numbers of size 1.
    assert list(output.aux) == ["feature"] and abs(loss - expected) < 1e-5 * expected
    across = WEIGHT * feature_loss(predicted, flat, positions, lengths, past_the_end=True)
    assert abs(loss - across) > 1e-3 * expected


def test_a_position_at_the_end_of_its_sequence_adds_nothing(random_head):
    """A sequence of three rows: nothing follows row 2, and row 1 has one feature to predict, at depth 0."""
    head = random_head("lstm_eagle", num_depths=2, hidden_size=SIZE, feature_weight=1.0)
    head.train()
    x = jt.array(np.random.default_rng(0).standard_normal((1, 3, DIM)).astype(np.float32))
    ids = np.array([[3, 4, 5, 6, 7]], np.int32)

    def loss(*positions):
        return head(Features(x), ids, np.array(positions, np.int32)).aux["feature"].item()

    assert loss(2) == 0
    assert loss(1) > 0
    assert abs(loss(1, 2) - loss(1)) < 1e-6 * loss(1)


def test_the_forget_gate_is_initially_open_and_the_others_are_not(backbone):
    head = build("lstm_eagle", {"hidden_size": 2}, backbone)
    np.testing.assert_array_equal(head.gates.bias.numpy(), [0, 0, 0, 0, 1, 1, 0, 0])


def test_the_number_of_parameters_is_that_of_the_equation(backbone):
    counts = {build("lstm_eagle", {"num_depths": n, "hidden_size": SIZE}, backbone).num_parameters for n in (1, 5)}
    assert counts == {4 * SIZE * (2 * DIM + SIZE + 1) + 2 * DIM * SIZE + 2 * DIM}


# Parts of the feature loss that other heads use too


def test_later_positions_stay_in_their_sequence():
    """The example of its docstring: two sequences of 3 and 2 rows."""
    later, valid = later_positions(np.arange(5), np.array([3, 2]), 1)
    assert later.tolist() == [1, 2, 2, 4, 4] and later.dtype == np.int32
    assert valid.tolist() == [True, True, False, True, False]
    later, valid = later_positions(np.array([0, 1, 3]), np.array([3, 2]), 2)
    assert later.tolist() == [2, 1, 3] and valid.tolist() == [True, False, False]
    assert later_positions(np.zeros(0, np.int32), np.array([3]), 1)[0].shape == (0,)


def test_smooth_l1_is_quadratic_within_one_and_linear_beyond():
    """d = (0, 1/2), (1, 2), and an invalid row: (0 + 1/8 + 1/2 + 3/2) / 4 = 17/32. Its gradient is d / 4
    within 1 and sign / 4 beyond; the target gets none."""
    predicted = jt.array(np.array([[1, 1.5], [0, -1], [9, 9]], np.float32))
    target = jt.array(np.array([[1, 1], [1, 1], [0, 0]], np.float32))
    valid = np.array([True, True, False])
    loss = smooth_l1(predicted, target, valid)
    assert loss.item() == 17 / 32
    np.testing.assert_array_equal(jt.grad(loss, predicted).numpy(), [[0, 1 / 8], [-1 / 4, -1 / 4], [0, 0]])
    np.testing.assert_array_equal(jt.grad(loss, target).numpy(), np.zeros((3, 2)))
    assert smooth_l1(predicted, target, np.zeros(3, bool)).item() == 0
