"""Cross-entropy in chunks against the equation in float64, its plain-Jittor reference, and logits taken all at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ops import linear_loss
from ops.linear import PackedLinear
from ops.linear_loss import linear_cross_entropy
from ops.select import top_k
from runtime import jt
from tests.ops.layers import normal

pytestmark = pytest.mark.usefixtures("body")
ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("own", "frozen", "low_rank")
# Around tiles of 6 x 64, vectors of 16, stretches of 128, blocks of 96, and chunks of 48 rows.
SIZES = [(11, 16, 3), (13, 37, 97), (100, 70, 130), (49, 300, 192)]


class Case:
    """Random factors, targets and a soft target; some rows are ignored, some list less than others."""

    def __init__(self, size, kind, soft=False):
        rows, width, vocab = size
        random = np.random.default_rng(size)
        self.kind = kind
        self.factors = [normal(rows, width), normal(vocab, width, seed=1) * np.float32(2 / width**0.5)]
        if kind == "low_rank":
            self.factors += [normal(rows, 5, seed=2), normal(vocab, 5, seed=3)]
        self.targets = random.integers(0, vocab, rows).astype(np.int32)
        self.targets[[2, 7]] = -100
        self.row_weights = random.uniform(0.5, 2, rows).astype(np.float32)
        self.soft, self.soft_share = None, 0.0
        if soft:
            k = min(4, vocab)
            ids = np.stack([random.permutation(vocab)[:k] for _ in range(rows)]).astype(np.int32)
            p = random.random((rows, k)).astype(np.float32)
            ids[3, 1:], p[3, 1:] = -1, 0
            ids[4], p[4] = -1, 0
            self.soft, self.soft_share = (ids, p / np.maximum(p.sum(1, keepdims=True), 1e-9)), 0.3

    def run(self, function=linear_cross_entropy, scale=1.0, targets=None, parts=1):
        """[total, losses, ranks, gradients of what is trained] of a function, the total counted ``scale`` times."""
        given = [jt.array(factor) for factor in self.factors]
        if self.kind != "own":
            given[1] = given[1].stop_grad()
        terms = list(zip(given[::2], given[1::2], strict=True))
        if parts > 1:
            terms = [(list(hidden.chunk(parts, 0)), weight) for hidden, weight in terms]
        known = jt.array(self.targets if targets is None else targets), jt.array(self.row_weights)
        soft = self.soft and tuple(jt.array(each) for each in self.soft)
        total, losses, ranks = function(terms, *known, soft, self.soft_share)
        grads = jt.grad(total * scale, [factor for factor in given if not factor.is_stop_grad()])
        return [each.numpy() for each in (total, losses, ranks, *grads)]

    def exact(self):
        """The same in float64, by hand."""
        factors = [factor.astype(np.float64) for factor in self.factors]
        x = sum(hidden @ weight.T for hidden, weight in zip(factors[::2], factors[1::2], strict=True))
        rows, kept, target = np.arange(len(x)), self.targets >= 0, np.maximum(self.targets, 0)
        highest = x.max(1, keepdims=True)
        log_q = x - highest - np.log(np.exp(x - highest).sum(1, keepdims=True))
        one_hot, p = np.eye(x.shape[1])[target], np.zeros(x.shape)
        if self.soft:
            for row, (ids, values) in enumerate(zip(*self.soft, strict=True)):
                for token, value in zip(ids.tolist(), values.tolist(), strict=True):
                    p[row, max(token, 0)] += value
        hard = -log_q[rows, target] * kept
        divergence = (np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - log_q), 0)).sum(1)
        s, w = self.soft_share, self.row_weights.astype(np.float64) * kept
        slope = ((1 - s) * (np.exp(log_q) - one_hot) + s * (p.sum(1, keepdims=True) * np.exp(log_q) - p)) * w[:, None]
        before = (x > x[rows, target][:, None]).sum(1)
        grads = [g for h, m in zip(factors[::2], factors[1::2], strict=True) for g in (slope @ m, slope.T @ h)]
        if self.kind != "own":
            del grads[1]
        total = (w * ((1 - s) * hard + s * divergence)).sum()
        return [total, hard, np.where(kept, before, -1), *grads]


def farthest(found, expected):
    """The largest difference, in units of each array's largest number (at least 1)."""
    return max(np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in zip(found, expected, strict=True))


# float32 rounding of sums over up to 300 products of size about 1; a wrong row, column or sign is off by 0.1 and more.
TOLERANCE = 1e-5


def in_chunks(terms, targets, row_weights, soft, soft_share):
    """Seven rows at a time on CUDA, 16 on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "chunk_rows", lambda vocab: 16)
        patch.setattr(linear_loss, "CUDA_CHUNK_BYTES", 7 * 4 * terms[0][1].shape[0])
        return linear_cross_entropy(terms, targets, row_weights, soft, soft_share)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [linear_cross_entropy, in_chunks])
def test_the_loss_the_ranks_and_every_gradient_are_those_of_the_equation(function, kind, soft):
    for size in SIZES if function is linear_cross_entropy else SIZES[1:3]:
        case = Case(size, kind, soft)
        found, expected = case.run(function, scale=2.5), case.exact()
        expected[3:] = [2.5 * grad for grad in expected[3:]]
        assert farthest(found, expected) < TOLERANCE, size
        np.testing.assert_array_equal(found[2], expected[2])
        assert not found[1][[2, 7]].any() and not found[3][[2, 7]].any()


def test_the_comparison_notices_a_shifted_target_a_lost_scale_and_a_lost_share():
    case = Case(SIZES[2], "low_rank", soft=True)
    expected = case.exact()
    shifted = np.where(case.targets >= 0, (case.targets + 1) % 130, -100).astype(np.int32)
    assert farthest(case.run(targets=shifted), expected) > 0.01
    assert farthest(case.run(scale=1.1), expected) > 0.01
    case.soft_share = 0.2
    assert farthest(case.run(), expected) > 0.01


def test_neither_parts_nor_the_size_of_a_chunk_change_a_bit(monkeypatch, body):
    case = Case((100, 70, 130), "low_rank", soft=True)
    complete = case.run()
    for one, other in zip(complete, case.run(parts=4), strict=True):
        np.testing.assert_array_equal(one, other)
    assert farthest(case.run(in_chunks, parts=4), case.exact()) < TOLERANCE
    if body == "cpu":  # on CUDA products are a library's, and sums those of its choice
        for rows in (16, 48):
            monkeypatch.setattr(linear_loss, "chunk_rows", lambda vocab, rows=rows: rows)
            for one, other in zip(complete, case.run(), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the gradients that each sweep makes."""
    shapes = []

    def spied(sweep):
        def spy(*given):
            found = sweep(*given)
            shapes.append([tuple(grad.shape) for grad in found[3] if grad is not None])
            return found

        return spy

    for name in ("_sweep_by_kernel", "_sweep_by_products"):
        monkeypatch.setattr(linear_loss, name, spied(getattr(linear_loss, name)))
    return shapes


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("own", [(13, 37), (97, 37)]), ("frozen", [(13, 37)]), ("low_rank", [(13, 37), (13, 5), (97, 5)])],
)
def test_a_frozen_weight_costs_no_gradient_and_ignored_rows_give_zeros(made, kind, shapes):
    case = Case(SIZES[1], kind, soft=True)
    total, losses, ranks, *grads = case.run(targets=np.full(13, -100, np.int32))
    assert made == [shapes]
    assert not total.any() and not losses.any() and (ranks == -1).all()
    assert not any(grad.any() for grad in grads)


def test_without_gradients_only_losses_and_ranks_are_made(made):
    case = Case(SIZES[1], "own")
    known = jt.array(case.targets), jt.array(case.row_weights)
    with jt.no_grad():
        found = linear_cross_entropy([tuple(jt.array(f) for f in case.factors)], *known)
    assert farthest([each.numpy() for each in found], case.exact()[:3]) < TOLERANCE
    assert made == [[]]


def test_equal_logits_rank_as_top_k_orders_them():
    random = np.random.default_rng(0)
    weight = np.repeat(random.integers(-3, 4, (40, 16)), 5, 0).astype(np.float32)  # every five tokens have one logit
    # Of whole numbers the logits are exact, whoever multiplies.
    hidden, targets = random.integers(-3, 4, (20, 16)).astype(np.float32), np.arange(3, 200, 10).astype(np.int32)
    _, _, ranks = linear_cross_entropy([(jt.array(hidden), jt.array(weight))], jt.array(targets), jt.ones((20,)))
    order = top_k(jt.array(hidden @ weight.T), 200)[1].numpy()
    np.testing.assert_array_equal(order[np.arange(20), ranks.numpy()], targets)
    assert (order[np.arange(20), ranks.numpy() - 1] != targets).all()


def test_logits_are_those_of_the_packed_product_bit_for_bit(body):
    """So a token's rank is the one that drafting gives it: here the three tokens' logits are a rounding apart."""
    if body == "cuda":
        pytest.skip("there, a library makes these logits and our kernels those of drafting")
    hidden, weight = normal(60, 300), normal(1, 300, seed=1)
    weight = np.concatenate([weight, np.nextafter(weight, np.float32(9)), weight * np.float32(1 + 2**-23)])
    logits = PackedLinear(weight)(jt.array(hidden)).numpy()
    assert (np.ptp(logits, 1) < 1e-4).all() and len(set(logits.argmax(1).tolist())) > 1
    for target in range(3):
        targets = jt.array(np.full(60, target, np.int32))
        ranks = linear_cross_entropy([(jt.array(hidden), jt.array(weight))], targets, jt.ones((60,)))[2].numpy()
        earlier = logits == logits[:, target : target + 1]
        expected = (logits > logits[:, target : target + 1]).sum(1) + earlier[:, :target].sum(1)
        np.testing.assert_array_equal(ranks, expected)


def test_a_divergence_alone_has_no_gradient_at_the_teachers_distribution():
    """And one away from it has: p = softmax of the logits, all of them listed."""
    hidden, weight = normal(6, 16), normal(5, 16, seed=1)
    logits = hidden.astype(np.float64) @ weight.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    targets, ids = np.zeros(6, np.int32), np.tile(np.arange(5, dtype=np.int32), (6, 1))
    for listed, still in ((p, True), (np.roll(p, 1, 0), False)):
        var = jt.array(hidden)
        soft = jt.array(ids), jt.array(np.ascontiguousarray(listed))
        given = [(var, jt.array(weight))], jt.array(targets), jt.ones((6,)), soft, 1.0
        total, losses, _ = linear_cross_entropy(*given)
        grad = jt.grad(total, var).numpy()
        assert (abs(float(total.item())) < 1e-5 and np.abs(grad).max() < 1e-5) == still
        assert losses.numpy().max() > 0.1  # what is reported stays the cross-entropy, and has no gradient
        assert not jt.grad(losses.sum() + 0 * var.sum(), var).numpy().any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_do_not_overflow(scale):
    hidden, weight = np.zeros((2, 16), np.float32), np.zeros((37, 16), np.float32)
    hidden[:, 0], weight[5, 0] = 1, scale
    given = [(jt.array(hidden), jt.array(weight))], jt.array(np.array([5, 6], np.int32)), jt.ones((2,))
    losses = linear_cross_entropy(*given)[1].numpy()
    expected = [0, 1e4] if scale > 0 else [1e4 + np.log(36), np.log(36)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-5)


def test_a_token_that_is_listed_twice_counts_twice():
    case = Case(SIZES[1], "own", soft=True)
    ids, _ = case.soft
    ids[:, 2] = ids[:, 0]
    ids[5] = case.targets[5]  # all of them, and the target too
    assert farthest(case.run()[3:], case.exact()[3:]) < TOLERANCE


def test_the_order_of_threads_changes_no_bit(monkeypatch):
    case, found = Case((9, 8, 2052), "own", soft=True), []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GORGON_EMULATOR_ORDER", order)
        found.append(case.run(in_chunks, scale=2.5))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    expected = case.exact()  # of rows that are wider than a block takes at once
    expected[3:] = [2.5 * grad for grad in expected[3:]]
    assert farthest(found[0], expected) < TOLERANCE


def test_on_cuda_gradients_are_returned_once(body):
    hidden, weight = jt.array(normal(5, 16)), jt.array(normal(9, 16, seed=1))
    known = jt.array(np.arange(5, dtype=np.int32)), jt.ones((5,))
    total = linear_cross_entropy([(hidden, weight)], *known)[0]
    jt.grad(total, hidden).sync()
    if body == "cpu":
        assert jt.grad(total, weight).numpy().any()
    else:
        with pytest.raises(Exception, match="returned once"):
            jt.grad(total, weight).sync()


def test_on_cuda_a_chunk_leaves_nothing_behind(monkeypatch, body):
    """Jittor holds equally many Vars after every chunk, from the third on: no logits of those before, and one product
    that was added to the weight's gradient, which the first chunk's became."""
    if body == "cpu":
        pytest.skip("there, a sweep is one call; the last test weighs it")
    rows, width, vocab = 70, 16, 130
    hidden, weight = jt.array(normal(rows, width)), jt.array(normal(vocab, width, seed=1))
    known = jt.array(np.zeros(rows, np.int32)), jt.ones((rows,))
    jt.sync_all()
    monkeypatch.setattr(linear_loss, "CUDA_CHUNK_BYTES", 10 * 4 * vocab)
    held, finish = [], linear_loss._finish_chunk

    def spy(*given):
        finish(*given)
        held.append(jt.core.number_of_lived_vars())

    monkeypatch.setattr(linear_loss, "_finish_chunk", spy)
    linear_cross_entropy([(hidden, weight)], *known)
    assert len(held) == 7 and len(set(held[2:])) == 1, held


def test_a_chunk_of_logits_fits_its_memory():
    assert [linear_loss.chunk_rows(vocab) for vocab in (1024, 4096, 32000, 128256, 10**6)] == [1536, 384, 384, 96, 48]
    for vocab in (64, 1000, 50257, 200000):
        assert linear_loss.chunk_rows(vocab) * vocab * 4 <= linear_loss.MOST_BYTES


def test_the_peak_of_memory_stays_below_that_of_all_logits(body):
    """Three heads of 12,000 tokens over 768 rows: all logits take 111 MB, their gradients as much."""
    if body == "cuda":
        pytest.skip("it is the host's memory that is weighed, of a process that emulates nothing")
    words = ("--heads", 3, "--vocab", 12000, "--width", 32, "--positions", 768, "--repeats", 0)
    command = [sys.executable, "bench/losses.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["gradients_agree"]
    if result["full"]["beyond_bytes"] is not None:
        assert result["full"]["beyond_bytes"] > 100e6 and result["memory_ratio"] > 3
