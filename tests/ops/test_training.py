"""Training operations against NumPy and finite differences."""

import numpy as np
import pytest

from ops.training import cross_entropy, kl_divergence, outer_product, trainable_linear
from runtime import jt
from tests.ops.layers import normal

pytestmark = pytest.mark.usefixtures("body")
# On CUDA a thread takes four numbers at a time, 2048 a turn, where rows are of a multiple of four, else one at a time.
VOCABULARIES = [3, 16, 37, 100, 2049, 2052]


# Weight gradients


# Around the strips of 6, panels of 64, groups of 96 and stretches of 256 rows of the kernel.
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 3), (17, 96, 64), (255, 13, 65), (256, 100, 17), (600, 101, 67)])
def test_an_outer_product_equals_numpy_within_rounding(size):
    rows, m, n = size
    a, b = normal(rows, m), normal(rows, n, seed=1)
    exact = a.astype(np.float64).T @ b.astype(np.float64)
    # At most one rounding of 2^-24 for each of the products and sums (Higham, 2002, eq. 3.5).
    bound = rows * 2.0**-24 * (np.abs(a).T.astype(np.float64) @ np.abs(b).astype(np.float64)) + 1e-30
    assert (np.abs(outer_product(jt.array(a), jt.array(b)).numpy() - exact) <= bound).all()
    shifted = outer_product(jt.array(np.roll(a, 1, 0)), jt.array(b)).numpy()
    assert rows == 1 or (np.abs(shifted - exact) > bound).any()


def test_on_cuda_an_outer_product_is_the_librarys_and_copies_neither_factor(body):
    a, b = jt.array(normal(33, 20)), jt.array(normal(33, 24, seed=1))
    with jt.profile_scope() as report:
        outer_product(a, b).sync()
    kernels = [row[0] for row in report[1:]]
    assert any("matmul" in name for name in kernels) == (body == "cuda"), kernels
    assert not any("transpose" in name for name in kernels), kernels
    assert not outer_product(jt.zeros((0, 5)), jt.zeros((0, 3))).numpy().any()


def test_a_trainable_linear_has_the_gradients_of_its_equation():
    x, weight, upstream = normal(9, 37), normal(21, 37, seed=1), normal(9, 21, seed=2)
    xv, wv = jt.array(x), jt.array(weight)
    y = trainable_linear(xv, wv)
    grad_x, grad_weight = jt.grad((y * jt.array(upstream)).sum(), [xv, wv])
    # Sums of at most 37 products of size about 1.
    np.testing.assert_allclose(y.numpy(), x @ weight.T, atol=2e-5)
    np.testing.assert_allclose(grad_x.numpy(), upstream @ weight, atol=2e-5)
    np.testing.assert_allclose(grad_weight.numpy(), upstream.T @ x, atol=2e-5)
    assert np.abs(grad_weight.numpy() - upstream.T @ np.roll(x, 1, 0)).max() > 1e-2


# Cross-entropy


def exact_cross_entropy(logits, targets):
    """(losses, ranks, gradient of the weighted sum at weight 1) in float64."""
    x = logits.astype(np.float64)
    highest = x.max(1, keepdims=True)
    log_sum = np.log(np.exp(x - highest).sum(1, keepdims=True)) + highest
    rows, kept = np.arange(len(x)), targets >= 0
    wanted = x[rows, np.maximum(targets, 0)]
    gradient = np.exp(x - log_sum)
    gradient[rows, np.maximum(targets, 0)] -= 1
    earlier = np.arange(x.shape[1]) < targets[:, None]
    above = (x > wanted[:, None]) | ((x == wanted[:, None]) & earlier)
    ranks = np.where(kept, above.sum(1), -1)
    return np.where(kept, log_sum[:, 0] - wanted, 0), ranks, gradient * kept[:, None]


def random_case(vocab, rows=11, scale=3.0):
    logits = normal(rows, vocab, seed=vocab) * np.float32(scale)
    targets = np.random.default_rng(vocab).integers(0, vocab, rows).astype(np.int32)
    targets[[2, 7]] = -100
    logits[3] = 0  # equal logits rank by their index
    return logits, targets


def run_cross_entropy(logits, targets, weights):
    logits_var = jt.array(logits)
    losses, ranks = cross_entropy(logits_var, jt.array(targets))
    gradient = jt.grad((losses * jt.array(weights)).sum(), logits_var)
    return losses.numpy(), ranks.numpy(), gradient.numpy()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_gives_loss_rank_and_gradient(vocab):
    logits, targets = random_case(vocab)
    weights = np.linspace(0.5, 2, len(logits)).astype(np.float32)
    losses, ranks, gradient = run_cross_entropy(logits, targets, weights)
    want_losses, want_ranks, want_gradient = exact_cross_entropy(logits, targets)
    np.testing.assert_allclose(losses, want_losses, atol=2e-5)  # log-sums of about 10, to float32
    np.testing.assert_array_equal(ranks, want_ranks)
    # The exponential of x - logsumexp, a difference of about 10 to float32.
    np.testing.assert_allclose(gradient, want_gradient * weights[:, None], rtol=1e-5, atol=2e-6)
    assert not losses[[2, 7]].any() and not gradient[[2, 7]].any() and (ranks[[2, 7]] == -1).all()
    losses, ranks, gradient = run_cross_entropy(logits, np.full(11, -100, np.int32), weights)
    assert not losses.any() and not gradient.any() and (ranks == -1).all()


def test_the_comparison_notices_a_target_that_is_off_by_one():
    logits, targets = random_case(37)
    shifted = np.where(targets >= 0, (targets + 1) % 37, targets).astype(np.int32)
    losses, ranks, gradient = run_cross_entropy(logits, shifted, np.ones(len(logits), np.float32))
    want_losses, want_ranks, want_gradient = exact_cross_entropy(logits, targets)
    assert np.abs(losses - want_losses).max() > 0.1
    assert (ranks != want_ranks).any() and np.abs(gradient - want_gradient).max() > 0.1


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_do_not_overflow(scale):
    logits = np.zeros((2, 37), np.float32)
    logits[:, 5] = scale
    targets = np.array([5, 6], np.int32)
    losses, _, gradient = run_cross_entropy(logits, targets, np.ones(2, np.float32))
    want_losses, _, want_gradient = exact_cross_entropy(logits, targets)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6, atol=1e-5)
    # The backward pass exponentiates x - logsumexp, which near 1e4 has a spacing of 1e-3.
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-3)


# KL divergence


def kl_by_numpy(logits, teacher):
    def log_softmax(x):
        x = x.astype(np.float64)
        return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(logits)
    return (np.exp(log_p) * (log_p - log_q)).sum(1), np.exp(log_q) - np.exp(log_p)


@pytest.mark.parametrize("width", [1, 15, 16, 37, 4096])
def test_the_kl_divergence_and_its_gradient_equal_numpy(width):
    random = np.random.default_rng(width)
    values, teacher = (random.standard_normal((5, width)).astype(np.float32) * scale for scale in (3, 40))
    weights = random.standard_normal(5).astype(np.float32)
    expected, slope = kl_by_numpy(values, teacher)
    slope *= weights[:, None]
    reversed_slope = kl_by_numpy(teacher, values)[1] * weights[:, None]
    logits, frozen = jt.array(values), jt.array(teacher)
    losses = kl_divergence(logits, frozen)
    grads = jt.grad((losses * jt.array(weights)).sum(), [logits, frozen])
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[0].numpy(), slope, atol=1e-5)
    assert not grads[1].numpy().any()
    assert np.abs(kl_divergence(logits, logits.copy()).numpy()).max() < 1e-6
    if width > 1:  # control: teacher and student changed places
        assert np.abs(grads[0].numpy() - reversed_slope).max() > 1e-3


@pytest.mark.parametrize("width", [2052, 37])
def test_the_order_of_threads_changes_no_bit(monkeypatch, width):
    logits, targets = random_case(width)
    weights = np.linspace(0.5, 2, len(logits)).astype(np.float32)
    found = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GORGON_EMULATOR_ORDER", order)
        var = jt.array(logits)
        losses = kl_divergence(var, jt.array(np.roll(logits, 1, 0)))
        gradient = jt.grad((losses * jt.array(weights)).sum(), var)
        entropies = run_cross_entropy(logits, targets, weights)
        found.append([losses.numpy(), gradient.numpy(), *entropies])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
