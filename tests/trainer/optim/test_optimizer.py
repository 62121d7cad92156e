"""Each optimizer over several steps against NumPy: clipping, decay, parameters by kind; and its state."""

import math

import numpy as np
import pytest

from runtime import jt
from trainer.config import TrainConfig
from trainer.optim.optimizer import OPTIMIZERS, NonFinite, gradient_norm

KINDS = tuple(OPTIMIZERS)
VOCAB = 11
SHAPES = {"matrix": (5, 7), "vector": (5,), "lm_head.weight": (VOCAB, 5), "experts": (2, 3, 4)}
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def begin(kind="adamw", shapes=SHAPES, rates=None, **changes):
    """(parameters by name, optimizer over them)."""
    parameters = {name: jt.array(normal(*shape)) for name, shape in shapes.items()}
    config = TrainConfig(optimizer=kind, **{**OPTIONS, "clip": 0.0, **changes})
    return parameters, OPTIMIZERS[kind](config, parameters, rates or dict.fromkeys(shapes, 1.0), {VOCAB})


def gradients(step):
    """Gradients of one step, the same for every optimizer; later ones are larger."""
    return [normal(*shape, seed=100 + step) * np.float32(step + 1) for shape in SHAPES.values()]


def run_steps(optimizer, first, last):
    """Updates from ``first`` up to but not including ``last``; returns the norms."""
    return [optimizer.update([jt.array(g) for g in gradients(step)], 1e-2) for step in range(first, last)]


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


def in_numpy(kind, steps, clip, rates):
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
            w -= 1e-2 * rates[name] * (direction + (0.1 * w if w.ndim > 1 else 0))
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


# Numbers that are not finite


@pytest.mark.parametrize(("kind", "bad"), [("adamw", np.nan), ("lion", np.inf), ("muon", -np.inf)])
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
