"""The schedule ends where it says, and clipping and decay do what torch's do."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from runtime import jt
from trainer.optimizer import AdamW, learning_rate


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    rates = [learning_rate(step, 100, 2e-3, 0.1, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[9] == pytest.approx(2e-3) and rates[10] < rates[9]
    assert rates[-1] == pytest.approx(0.05 * 2e-3)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[9:]))
    middle = learning_rate(9 + 90 / 2, 100, 2e-3, 0.1, 0.05)
    assert middle == pytest.approx(2e-3 * (1 + 0.05) / 2)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
def test_the_rate_of_a_short_run_stays_between_nothing_and_its_peak(num_steps, warmup):
    rates = [learning_rate(step, num_steps, 1.0, warmup, 0.1) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    if round(warmup * num_steps) < num_steps and num_steps > 1:
        assert rates[-1] == pytest.approx(0.1)


OPTIONS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def run_jittor(clip, steps=4, **changes):
    """(matrix, vector, norms) after some steps on the loss sum (w x + b - y)^2."""
    matrix, vector = jt.array(normal(5, 7)), jt.array(normal(5, seed=1))
    optimizer = AdamW([matrix, vector], clip=clip, **{**OPTIONS, **changes})
    norms = []
    for step in range(steps):
        x, y = jt.array(normal(7, 3, seed=step)), jt.array(normal(5, 3, seed=step))
        loss = (jt.matmul(matrix, x) + vector.unsqueeze(1) - y).sqr().sum()
        norms.append(optimizer.update(loss, 1e-2))
    assert optimizer.steps == steps
    return matrix.numpy(), vector.numpy(), norms


def run_torch(clip, steps=4):
    matrix, vector = (torch.nn.Parameter(torch.tensor(a)) for a in (normal(5, 7), normal(5, seed=1)))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(steps):
        x, y = torch.tensor(normal(7, 3, seed=step)), torch.tensor(normal(5, 3, seed=step))
        optimizer.zero_grad()
        (matrix @ x + vector[:, None] - y).square().sum().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([matrix, vector], clip or float("inf"))))
        optimizer.step()
    return matrix.detach().numpy(), vector.detach().numpy(), norms


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_updates_equal_torch_with_clipping_and_no_decay_of_vectors(clip):
    got, want = run_jittor(clip), run_torch(clip)
    # Four updates of 1e-2 in float32; torch adds 1e-6 to the norm it divides by.
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1], want[1], atol=2e-6)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)  # norms before clipping
    assert min(got[2]) > 1


@pytest.mark.parametrize("defect", [{"clip": 30.0}, {"weight_decay": 0.0}, {"beta1": 0.8}])
def test_the_comparison_notices_a_wrong_option(defect):
    matrix, _, _ = run_jittor(**{"clip": 1.0, **defect})
    assert np.abs(matrix - run_torch(1.0)[0]).max() > 2e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(bad):
    weight = jt.array(normal(4, 3))
    optimizer = AdamW([weight], clip=1.0, **OPTIONS)
    optimizer.update((weight * weight).sum(), 1e-2)
    before = [v.numpy().copy() for v in (weight, *optimizer.means, *optimizer.squares)]
    scales = np.ones((4, 3), np.float32)
    scales[1, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        optimizer.update((weight * jt.array(scales)).sum(), 1e-2)
    for old, now in zip(before, (weight, *optimizer.means, *optimizer.squares), strict=True):
        np.testing.assert_array_equal(old, now.numpy())
    assert optimizer.steps == 1
