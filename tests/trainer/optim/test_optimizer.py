"""Each optimizer over several steps against NumPy: clipping, decay, parameters by kind; and its state."""

import math

import numpy as np
import pytest

from runtime import jt
from trainer.config import OPTIMIZERS as NAMES
from trainer.config import TrainConfig
from trainer.optim.optimizer import OPTIMIZERS, NonFinite, gradient_norm

KINDS = tuple(OPTIMIZERS)
VOCAB = 11
SHAPES = {"matrix": (5, 7), "vector": (5,), "lm_head.weight": (VOCAB, 5), "experts": (2, 3, 4)}
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def begin(kind="adamw", shapes=SHAPES, rates=None, seed=0, **changes):
    """(parameters by name, optimizer over them)."""
    parameters = {name: jt.array(normal(*shape, seed=seed)) for name, shape in shapes.items()}
    config = TrainConfig(optimizer=kind, **{**OPTIONS, "clip": 0.0, **changes})
    return parameters, OPTIMIZERS[kind](config, parameters, rates or dict.fromkeys(shapes, 1.0), {VOCAB})


def gradients(step, shapes=SHAPES):
    """Gradients of one step, the same for every optimizer; later ones are larger."""
    return [normal(*shape, seed=100 + step) * np.float32(step + 1) for shape in shapes.values()]


def run_steps(optimizer, first, last, rate=1e-2):
    """Updates from ``first`` up to but not including ``last``; returns the norms."""
    return [optimizer.update([jt.array(g) for g in gradients(step)], rate) for step in range(first, last)]


def values(parameters):
    return {name: p.numpy().copy() for name, p in parameters.items()}


# All of them against NumPy, on given gradients


def newton_schulz(matrix):
    """By the singular values: five times the polynomial of Muon's authors."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


def in_numpy(kind, steps, clip=0.0, rates=None, rate=1e-2, decay=0.1):
    """The parameters after some updates, in double precision, and the norms."""
    weights = {name: normal(*shape).astype(np.float64) for name, shape in SHAPES.items()}
    first, second = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    norms = []
    for step in range(steps):
        grads = [g.astype(np.float64) for g in gradients(step)]
        norms.append(math.sqrt(sum((g * g).sum() for g in grads)))
        if clip and norms[-1] > clip:
            grads = [g * clip / norms[-1] for g in grads]
        for name, g in zip(SHAPES, grads, strict=True):
            w, m = weights[name], first[name]
            if kind == "lion":
                direction = np.sign(0.9 * m + 0.1 * g)
                m[:] = 0.95 * m + 0.05 * g
            elif kind == "muon" and name == "matrix":
                m[:] = 0.9 * m + g
                direction = 0.2 * math.sqrt(7) * newton_schulz(g + 0.9 * m)
            else:
                m[:] = 0.9 * m + 0.1 * g
                second[name][:] = 0.95 * second[name] + 0.05 * g * g
                corrected = second[name] / (1 - 0.95 ** (step + 1))
                direction = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(corrected) + 1e-8)
            w -= rate * (rates or {}).get(name, 1.0) * (direction + (decay * w if w.ndim > 1 else 0))
    return weights, norms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 20.0])
def test_five_updates_equal_numpy(kind, clip):
    rates = {"matrix": 1.0, "vector": 0.5, "lm_head.weight": 2.0, "experts": 1.0}
    parameters, optimizer = begin(kind, rates=rates, clip=clip)
    norms = run_steps(optimizer, 0, 5)
    weights, want_norms = in_numpy(kind, 5, clip, rates)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-6)
    assert min(norms) < 20 < max(norms)  # some are clipped, some are not
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.numpy(), weights[name], atol=3e-6, err_msg=name)
    without_clipping, _ = in_numpy(kind, 5, 0.0 if clip else 20.0, rates)
    assert max(np.abs(without_clipping[name] - weights[name]).max() for name in weights) > 1e-5
    for other in set(KINDS) - {kind}:
        assert np.abs(in_numpy(other, 5, clip, rates)[0]["matrix"] - weights["matrix"]).max() > 1e-3


def test_muon_updates_hidden_matrices_and_adamw_the_rest():
    _, optimizer = begin("muon", {**SHAPES, "embedding": (5, VOCAB)}, dict.fromkeys([*SHAPES, "embedding"], 1.0))
    assert [name for name in optimizer.moments if name.startswith("momentum.")] == ["momentum.matrix"]
    by_adamw = {name.split(".", 1)[1] for name in optimizer.moments if name.startswith("square.")}
    assert by_adamw == {"vector", "lm_head.weight", "experts", "embedding"}


def test_a_muon_update_has_singular_values_near_one_and_the_size_of_adamws():
    shapes = {"wide": (24, 64), "tall": (64, 24)}
    parameters, optimizer = begin("muon", shapes, weight_decay=0.0)
    before = values(parameters)
    optimizer.update([jt.array(g) for g in gradients(0, shapes)], 1e-2)
    for name, parameter in parameters.items():
        update = (before[name] - parameter.numpy()) / (1e-2 * 0.2 * math.sqrt(64))
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular.min() > 0.67 and singular.max() < 1.21, name
        assert 0.13 < np.sqrt((update * 0.2 * math.sqrt(64)) ** 2).mean() < 0.24, name


def test_every_optimizer_of_the_options_exists():
    assert KINDS == NAMES


def test_gradients_of_another_order_are_refused():
    _, optimizer = begin()
    with pytest.raises(AssertionError, match="7"):
        optimizer.update([jt.array(g) for g in gradients(0)[::-1]], 1e-2)
    assert optimizer.steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_values_computed_from_the_old_weights_do_not_change(kind):
    parameters, optimizer = begin(kind)
    grads = [jt.array(g) for g in gradients(0)]
    waiting = {name: parameter * 2 for name, parameter in parameters.items()}  # not computed yet
    old = {name: normal(*shape) * 2 for name, shape in SHAPES.items()}
    optimizer.update(grads, 1e-2)
    for name, doubled in waiting.items():
        np.testing.assert_array_equal(doubled.numpy(), old[name])
        assert np.abs(parameters[name].numpy() * 2 - old[name]).max() > 1e-3


def test_updates_leave_no_graph_behind():
    for kind in KINDS:
        _, optimizer = begin(kind)
        counts = []
        for step in range(4):
            run_steps(optimizer, step, step + 1)
            jt.sync_all()
            counts.append((jt.core.number_of_lived_vars(), jt.core.number_of_lived_ops()))
        assert len(set(counts[1:])) == 1, (kind, counts)


# Numbers that are not finite


@pytest.mark.parametrize(("kind", "bad"), zip(KINDS, [np.nan, np.inf, -np.inf], strict=True))
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(kind, bad):
    parameters, optimizer = begin(kind, clip=1.0)
    run_steps(optimizer, 0, 1)
    before = {**values(parameters), **optimizer.state()}
    for place in range(len(SHAPES)):
        grads = gradients(1)
        grads[place].reshape(-1)[-1] = bad
        assert not math.isfinite(gradient_norm([jt.array(g) for g in grads]))
        named = list(SHAPES)[place]
        with pytest.raises(NonFinite, match=rf"not finite \({named}\)"):
            optimizer.update([jt.array(g) for g in grads], 1e-2)
    after = {**values(parameters), **optimizer.state()}
    assert before.keys() == after.keys()
    for name, old in before.items():
        np.testing.assert_array_equal(old, after[name], err_msg=name)
    run_steps(optimizer, 1, 2)
    assert optimizer.steps == 2 and not np.array_equal(before["matrix"], parameters["matrix"].numpy())


# State


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_state_gives_the_same_bits(kind):
    parameters, optimizer = begin(kind)
    run_steps(optimizer, 0, 3)
    state, weights = optimizer.state(), values(parameters)
    assert state["steps"].dtype == np.int64 and state["steps"] == 3
    copies = {name: array.copy() for name, array in state.items()}
    results = []
    for loads in (True, False):
        others, other = begin(kind, seed=7)
        for name, parameter in others.items():
            parameter.update(jt.array(weights[name]))
        if loads:
            other.load_state(state)
        run_steps(other, 3, 6)
        results.append((values(others), other.state()))
    run_steps(optimizer, 3, 6)
    for name, value in values(parameters).items():
        np.testing.assert_array_equal(value, results[0][0][name])
        assert kind == "lion" or not np.array_equal(value, results[1][0][name])  # control: without the state
    for name, value in optimizer.state().items():
        np.testing.assert_array_equal(value, results[0][1][name])
        assert not np.array_equal(value, results[1][1][name])
        np.testing.assert_array_equal(state[name], copies[name])  # later updates do not change it


def test_a_state_that_does_not_fit_is_refused_and_every_entry_named():
    _, optimizer = begin()
    run_steps(optimizer, 0, 2)
    fitting = optimizer.state()
    changed = {
        **fitting,
        "mean.matrix": fitting["mean.matrix"].T,
        "square.vector": np.zeros(5),
        "mean.stray": fitting["steps"],
    }
    del changed["mean.vector"], changed["square.matrix"]
    with pytest.raises(ValueError, match="adamw") as caught:
        optimizer.load_state(changed)
    message = str(caught.value)
    for part in (
        *("mean.vector is missing", "square.matrix is missing", "mean.stray is int64 (), expected none"),
        *("mean.matrix is float32 (7, 5), expected float32 (5, 7)", "square.vector is float64 (5,)", "start over"),
    ):
        assert part in message, (part, message)
    assert "lm_head" not in message
    for steps in (None, np.int32(3), np.array([3]), np.array(2.0)):
        wrong = {**fitting, "steps": steps}
        if steps is None:
            del wrong["steps"]
        with pytest.raises(ValueError, match="steps"):
            optimizer.load_state(wrong)
    for name, value in optimizer.state().items():
        np.testing.assert_array_equal(value, fitting[name])
