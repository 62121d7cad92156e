"""The mixture of experts, its routing and its balance loss against their equations in NumPy."""

import numpy as np
import pytest

from heads.registry import build
from runtime import jt
from tests.heads.parity import DEPTHS, DIM, VOCAB, apart, close, draw_text, lm_weight_of, parameters_of, silu
from tests.heads.parity import run as run_head

ROWS, EXPERTS, INNER = 11, 5, 24
SMALL = {"num_depths": DEPTHS, "num_experts": EXPERTS, "inner_size": INNER, "rank": 4}


def hidden_rows():
    return draw_text(ROWS)[0]


def run(head, x):
    return run_head(head, x, np.zeros((1, ROWS + DEPTHS), np.int32))


def experts_of(p, depth):
    """Each expert's (router row, A, b, B) at this depth."""
    for i in range(EXPERTS):
        part = slice(i * INNER, (i + 1) * INNER)
        router = p["router.weight"][depth * EXPERTS + i]
        yield router, p["expert_in.weight"][part], p["depth_bias"][depth, part], p["expert_out.weight"][:, part]


def mixture(p, x, depth, top_k, renormalized=True):
    """Row by row, expert by expert: y = x + sum over the best of g_i B_i SiLU(A_i x + b_i). Returns y, the
    probabilities and the choices, (rows, experts) each."""
    experts = list(experts_of(p, depth))
    ys, ps, choices = [], [], []
    for row in x:
        scores = np.exp([router @ row for router, *_ in experts])
        scores /= scores.sum()
        best = sorted(range(EXPERTS), key=lambda i: -scores[i])[:top_k]
        total = sum(scores[i] for i in best) if top_k > 1 and renormalized else 1
        y = row
        for i in best:
            _, a, b, out = experts[i]
            y = y + scores[i] / total * out @ silu(a @ row + b)
        ys.append(y)
        ps.append(scores)
        choices.append([float(i in best) for i in range(EXPERTS)])
    return np.array(ys), np.array(ps), np.array(choices)


@pytest.mark.parametrize(("top_k", "lm_head"), [(1, "own"), (2, "shared"), (3, "low_rank"), (5, "shared")])
@pytest.mark.parametrize("training", [True, False])
def test_logits_balance_loss_and_usage_are_those_of_the_equation(random_head, backbone, training, top_k, lm_head):
    head = random_head("moe", top_k=top_k, lm_head=lm_head, balance_weight=0.5, **SMALL)
    head.train() if training else head.eval()
    x = hidden_rows()
    output, p = run(head, x), parameters_of(head)
    balance, usage = [], []
    for depth in range(DEPTHS):
        logits, lm_weight = output.logits[depth].value().numpy(), lm_weight_of(p, depth, backbone)
        y, probabilities, chosen = mixture(p, x.astype(np.float64), depth, top_k)
        assert close(logits, y @ lm_weight.T)
        for wrong_k, renormalized in ((top_k % EXPERTS + 1, True), (top_k, False)):
            wrong, *_ = mixture(p, x.astype(np.float64), depth, wrong_k, renormalized)
            if 1 < top_k < EXPERTS or renormalized:  # else p sums to 1 already, or is never renormalized
                assert apart(logits, wrong @ lm_weight.T)
        # arXiv 2101.03961, eq. 5 and 6 with top_k choices a row: f sums to 1.
        f, mean = chosen.sum(0) / (ROWS * top_k), probabilities.mean(0)
        balance.append(EXPERTS * (f * mean).sum())
        usage.append(chosen / top_k)
    assert list(output.aux) == ["load_balance"]
    # A mean of a few dozen float32 numbers below 1.
    assert abs(output.aux["load_balance"].item() - 0.5 * np.mean(balance)) < 1e-6
    if top_k < EXPERTS:  # with all experts chosen the loss is 1 for any router
        assert abs(output.aux["load_balance"].item() - 0.5) > 1e-4
    if training:
        assert output.stats == {}
    else:
        found = np.asarray(output.stats["expert_usage"], np.float64)
        assert found.shape == (ROWS, DEPTHS, EXPERTS)
        np.testing.assert_allclose(found, np.stack(usage, 1), atol=1e-7)
        np.testing.assert_allclose(found.sum(2), 1, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_the_gate_is_exactly_zero_outside_the_top_k(random_head, top_k):
    head = random_head("moe", top_k=top_k, **SMALL)
    p, chosen, gates = (part.numpy() for part in head.route(jt.array(hidden_rows())))
    assert ((gates != 0).sum(2) == top_k).all() and ((gates != 0) == (chosen == 1)).all()
    assert (np.where(chosen == 1, p, 1).min(2) >= np.where(chosen == 1, 0, p).max(2)).all()
    if top_k > 1:
        np.testing.assert_allclose(gates.sum(2), 1, atol=1e-6)
    else:
        np.testing.assert_array_equal(gates.max(2), p.max(2))


def test_of_equal_experts_the_first_are_chosen(random_head):
    head = random_head("moe", top_k=2, **SMALL)
    head.router.weight.update(jt.zeros_like(head.router.weight))
    _, _, gates = head.route(jt.array(hidden_rows()))
    np.testing.assert_array_equal(gates.numpy(), np.broadcast_to([0.5, 0.5, 0, 0, 0], (ROWS, DEPTHS, EXPERTS)))


def test_the_balance_loss_is_lowest_for_even_use_and_highest_for_one_expert(random_head):
    head = random_head("moe", top_k=1, **SMALL)
    even = np.broadcast_to(np.eye(EXPERTS)[:, None], (EXPERTS, DEPTHS, EXPERTS)).astype(np.float32)
    alone = np.broadcast_to(np.eye(EXPERTS)[0], (EXPERTS, DEPTHS, EXPERTS)).astype(np.float32)
    assert abs(head.balance_loss(jt.array(even), jt.array(even)).item() - 1) < 1e-6
    assert abs(head.balance_loss(jt.array(alone), jt.array(alone)).item() - EXPERTS) < 1e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_gets_gradients_from_the_guesses(random_head, top_k):
    """Without the balance loss: a single renormalized gate would be 1 for any router."""
    head = random_head("moe", top_k=top_k, balance_weight=0.0, **SMALL)
    head.train()
    chosen = jt.array(np.eye(ROWS, VOCAB, dtype=np.float32))
    loss = sum((logits.value() * chosen).sum() for logits in run(head, hidden_rows()).logits)
    assert np.abs(jt.grad(loss, head.router.weight).numpy()).max() > 1e-3


def test_the_number_of_parameters_is_that_of_the_equation(backbone):
    block = 2 * EXPERTS * INNER * DIM + DEPTHS * EXPERTS * (INNER + DIM)
    for lm_head, own in (("own", VOCAB * DIM), ("shared", 0), ("low_rank", 4 * (VOCAB + DIM))):
        assert build("moe", {"lm_head": lm_head, **SMALL}, backbone).num_parameters == block + DEPTHS * own
