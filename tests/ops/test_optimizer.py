"""The optimizers' kernels against values worked by hand, NumPy, their references and torch."""

import math

import numpy as np
import pytest
import torch

from ops.optimizer import (
    ITERATIONS,
    NEWTON_SCHULZ,
    adamw,
    exchange,
    lion,
    move_average,
    muon,
    orthogonalize,
    squared_norm,
)
from runtime import jt
from tests.ops.layers import normal

pytestmark = pytest.mark.usefixtures("body")


# The norm


def test_the_squared_norm_adds_over_all_gradients_in_double_precision():
    grads = [normal(13, 7), normal(5000, seed=1), np.full(3, 1e4, np.float32), np.full(9000, 1e-3, np.float32)]
    exact = math.fsum((g.astype(np.float64) ** 2).sum() for g in grads)
    assert squared_norm([jt.array(g) for g in grads]) == pytest.approx(exact, rel=1e-12)
    single = np.float32(0)
    for g in grads:
        single += (g * g).sum(dtype=np.float32)
    assert abs(float(single) - exact) > 1e-12 * exact
    assert squared_norm([]) == 0
    assert squared_norm([jt.array(np.full(3, 3e38, np.float32))]) == pytest.approx(3 * 9e76, rel=1e-6)


def test_the_squared_norm_of_a_row_that_begins_anywhere():
    values = normal(4, 5003)  # of which three do not begin where a load of 16 bytes may
    whole = jt.array(values)
    for row in range(4):
        exact = (values[row].astype(np.float64) ** 2).sum()
        assert squared_norm([whole[row]]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("count", "bad"), [(1, np.nan), (16, np.inf), (100, -np.inf), (9001, np.nan)])
def test_a_number_that_is_not_finite_makes_the_norm_so_wherever_it_stands(bad, count):
    for place in sorted({0, count // 2, min(count - 1, 4095), min(count - 1, 4096), count - 1}):
        grad = normal(count)
        assert math.isfinite(squared_norm([jt.array(grad)]))
        grad[place] = bad
        assert not math.isfinite(squared_norm([jt.array(grad)])), place
        assert not math.isfinite(squared_norm([jt.ones((3,)), jt.array(grad), jt.ones((3,))])), place
    for pair in ([np.inf, -np.inf], [np.nan, np.inf]):  # they do not cancel
        assert not math.isfinite(squared_norm([jt.array(np.array(pair, np.float32))]))


def test_the_order_of_threads_changes_no_bit(monkeypatch):
    """Nor does the one array of sums mix gradients up: each is found where it was put."""
    grads = [jt.array(normal(count)) for count in (5, 5000, 9001, 4096)]
    matrix, found = jt.array(normal(40, 30)), []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GORGON_EMULATOR_ORDER", order)
        alone = [squared_norm([grad]) for grad in grads]
        assert squared_norm(grads) == math.fsum(alone)
        found.append((alone, orthogonalize(matrix).numpy().tolist()))
    assert found[0] == found[1]


# AdamW

ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def run(update, count, steps=5, shape=(13, 7), **options):
    """The weight and ``count`` moments, begun as zero, after some updates at rates that fall."""
    state = [normal(*shape), *(np.zeros(shape, np.float32) for _ in range(count))]
    for step in range(1, steps + 1):
        each = {**options, "rate": 1e-2 / step, "scale": 0.5}
        state = update(state, normal(*shape, seed=step), step, each)
    return state


def by_kernel(kernel):
    def update(state, grad, step, options):
        places = [jt.array(value) for value in state]
        kernel(places[0], jt.array(grad), *places[1:], **options, **({"step": step} if kernel is adamw else {}))
        return [place.numpy() for place in places]

    return update


def test_adamw_equals_torch_over_five_steps():
    weight = torch.nn.Parameter(torch.tensor(normal(13, 7)))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        weight.grad = torch.tensor(normal(13, 7, seed=step)) * 0.5
        optimizer.param_groups[0]["lr"] = 1e-2 / step
        optimizer.step()
    want = weight.detach().numpy()
    np.testing.assert_allclose(run(by_kernel(adamw), 2, **ADAMW)[0], want, atol=1e-6)
    for defect in ({"weight_decay": 0.0}, {"beta2": 0.96}, {"eps": 1e-2}):
        assert np.abs(run(by_kernel(adamw), 2, **{**ADAMW, **defect})[0] - want).max() > 1e-5, defect


# Lion

LION = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def lion_by_numpy(state, grad, step, options):
    weight, momentum = (value.astype(np.float64) for value in state)
    grad = grad.astype(np.float64) * options["scale"]
    sign = np.sign(options["beta1"] * momentum + (1 - options["beta1"]) * grad)
    weight = weight - options["rate"] * (sign + options["weight_decay"] * weight)
    return weight, options["beta2"] * momentum + (1 - options["beta2"]) * grad


def test_lion_equals_numpy_over_five_steps():
    want = run(lion_by_numpy, 1, **LION)
    for got, expected in zip(run(by_kernel(lion), 1, **LION), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    for defect in ({"weight_decay": 0.0}, {"beta1": 0.5}):
        assert np.abs(run(by_kernel(lion), 1, **{**LION, **defect})[0] - want[0]).max() > 1e-5, defect
    assert np.abs(run(by_kernel(lion), 1, **{**LION, "beta2": 0.9})[1] - want[1]).max() > 1e-3


# Muon

MUON = {"beta": 0.9, "weight_decay": 0.1}
SHAPES = [(13, 7), (7, 13), (64, 64), (5, 40), (1, 9)]


def orthogonalized_by_svd(matrix):
    """Newton-Schulz's polynomial applied to the singular values themselves, in double precision."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s * s).sum())
    for _ in range(ITERATIONS):
        s = NEWTON_SCHULZ[0] * s + NEWTON_SCHULZ[1] * s**3 + NEWTON_SCHULZ[2] * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape):
    matrix = normal(*shape)
    want = orthogonalized_by_svd(matrix)
    # Iterations enlarge the rounding of small singular values by up to 3.4445^5 = 485.
    np.testing.assert_allclose(orthogonalize(jt.array(matrix)).numpy(), want, atol=2e-5)
    assert not orthogonalize(jt.zeros(shape)).numpy().any()
    if min(shape) > 1:  # control: one row of another sign
        matrix[0] *= -1
        assert np.abs(orthogonalize(jt.array(matrix)).numpy() - want).max() > 1e-3


def muon_by_numpy(state, grad, step, options):
    weight, momentum = (value.astype(np.float64) for value in state)
    grad = grad.astype(np.float64) * options["scale"]
    momentum = options["beta"] * momentum + grad
    update = 0.2 * np.sqrt(max(weight.shape)) * orthogonalized_by_svd(grad + options["beta"] * momentum)
    return weight - options["rate"] * (update + options["weight_decay"] * weight), momentum


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_numpy_over_five_steps(shape):
    want = run(muon_by_numpy, 1, shape=shape, **MUON)
    for got, expected in zip(run(by_kernel(muon), 1, shape=shape, **MUON), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-6)
    for defect in ({"weight_decay": 0.0}, {"beta": 0.5}):
        if min(shape) > 1:  # the direction of one row hardly turns
            assert np.abs(run(by_kernel(muon), 1, shape=shape, **{**MUON, **defect})[0] - want[0]).max() > 1e-5, defect


# In place


def all_of_them(shape):
    """Every update as a function of (weight, grad, moments), by name, with how many moments it takes."""
    step = {"rate": 0.1, "scale": 0.5}
    return {
        "adamw": (2, lambda w, g, *m: adamw(w, g, *m, step=1, **step, **ADAMW)),
        "lion": (1, lambda w, g, *m: lion(w, g, *m, **step, **LION)),
        **({"muon": (1, lambda w, g, *m: muon(w, g, *m, **step, **MUON))} if len(shape) == 2 else {}),
        "move_average": (0, lambda w, g: move_average(w, g, 0.75)),
        "exchange": (0, lambda w, g: exchange(w, g)),
    }


def live():
    jt.sync_all()
    return jt.core.number_of_lived_vars(), jt.core.number_of_lived_ops()


@pytest.mark.parametrize("shape", [(1,), (40,), (5, 9)])
def test_a_parameter_is_updated_alike_wherever_it_lies(monkeypatch, body, shape):
    """Also as a row of a larger array, which need not begin where a load of 16 bytes may, to rounding: a compiler fuses
    what it sees together. And whatever CUDA's threads do first, there bit for bit."""
    for name, (count, update) in all_of_them(shape).items():
        results = []
        for row, order in ((0, "ascending"), (1, "ascending"), (1, "descending")):
            monkeypatch.setenv("GORGON_EMULATOR_ORDER", order)
            values = [np.abs(normal(*shape, seed=seed)) for seed in range(2 + count)]
            wholes = [
                jt.array(np.stack([value if place == row else value + 1 for place in range(3)])) for value in values
            ]
            places = [whole[row] for whole in wholes]
            jt.sync_all()
            update(*places)
            results.append([place.numpy() for place in places])
        for first, moved, descending in zip(*results, strict=True):
            np.testing.assert_allclose(moved, first, rtol=1e-6, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(descending, moved, rtol=0 if body == "cuda" else 1e-6, err_msg=name)
        assert np.abs(results[0][0] - values[0]).max() > 1e-3, name


def test_updates_leave_no_graph_behind_and_parameters_that_have_gradients():
    for name, (count, update) in all_of_them((5, 9)).items():
        places = [jt.array(np.abs(normal(5, 9, seed=seed))) for seed in range(2 + count)]
        update(*places)
        before = live()
        for _ in range(3):
            update(*places)
        assert live() == before, name
        assert np.abs(jt.grad((places[0] * places[0]).sum(), places[0]).numpy()).max() > 0, name
    kept = [jt.ones((5, 9))]
    before = live()
    kept.append(kept[-1] * 2)  # control: a graph is counted
    assert live() != before


# Moving averages


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_moves_by_its_share_and_that_of_constant_values_stays_bit_for_bit(decay):
    average, value = (jt.array(np.array(x, np.float32)) for x in ([1, 2, -4], [5, 2, 4]))
    move_average(average, value, 0.75)
    np.testing.assert_array_equal(average.numpy(), [2, 2, -2])
    np.testing.assert_array_equal(value.numpy(), [5, 2, 4])
    values = normal(5000)
    average, value = jt.array(values), jt.array(values)
    for _ in range(20):
        move_average(average, value, decay)
    np.testing.assert_array_equal(average.numpy(), values)
    # Written with two factors it would drift.
    drifted, kept, share = values.copy(), np.float32(decay), np.float32(1 - decay)
    for _ in range(20):
        drifted = kept * drifted + share * values
    assert (drifted != values).any()


@pytest.mark.parametrize("count", [1, 17, 4096, 9001])
def test_values_change_places_bit_for_bit(count):
    # Any bits: NaNs with payloads, infinities, minus zero, denormal numbers.
    random = np.random.default_rng(count)
    a, b = (random.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32) for _ in range(2))
    special = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1, 0x7F800001], np.uint32)[:count]
    a[: len(special)] = special
    one, other = (jt.array(bits.view(np.float32).copy()) for bits in (a, b))
    exchange(one, other)
    np.testing.assert_array_equal(one.numpy().view(np.uint32), b)
    np.testing.assert_array_equal(other.numpy().view(np.uint32), a)
