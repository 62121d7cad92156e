"""Cross-entropy in chunks against the equation in float64, its plain-Jittor reference, and logits taken all at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ops import linear_loss
from ops.linear import PackedLinear
from ops.linear_loss import linear_cross_entropy, reference_linear_cross_entropy
from ops.select import top_k
from runtime import jt

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("own", "frozen", "low_rank")
# Around tiles of 6 x 64, vectors of 16, stretches of 128, blocks of 96, and chunks of 48 rows.
SIZES = [(11, 16, 3), (13, 37, 97), (100, 70, 130), (49, 300, 192)]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


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


def by_reference_in_chunks(terms, targets, row_weights, soft, soft_share):
    """The plain-Jittor sweep, seven rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "on_cpu", lambda: False)
        patch.setattr(linear_loss, "PLAIN_CHUNK_BYTES", 7 * 4 * terms[0][1].shape[0])
        return linear_cross_entropy(terms, targets, row_weights, soft, soft_share)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [linear_cross_entropy, reference_linear_cross_entropy, by_reference_in_chunks])
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


def test_parts_on_top_of_each_other_are_rows_of_one():
    case = Case((100, 70, 130), "low_rank", soft=True)
    for one, other in zip(case.run(), case.run(parts=4), strict=True):
        np.testing.assert_array_equal(one, other)
    found = case.run(lambda *given: by_reference_in_chunks(*given), parts=4)
    assert farthest(found, case.exact()) < TOLERANCE


def test_the_size_of_a_chunk_changes_no_bit(monkeypatch):
    """Sums go on where the chunk before stopped."""
    case = Case((100, 70, 130), "own", soft=True)
    whole = case.run()
    for rows in (16, 48):
        monkeypatch.setattr(linear_loss, "chunk_rows", lambda vocab, rows=rows: rows)
        for one, other in zip(whole, case.run(), strict=True):
            np.testing.assert_array_equal(one, other)


def outputs_of(monkeypatch, run):
    """The shapes that the kernel is asked for."""
    asked, code = [], jt.code

    def spy(shapes, *rest, **options):
        if options.get("data", {}).get("chunk_rows"):
            asked.append([tuple(shape) for shape in shapes])
        return code(shapes, *rest, **options)

    monkeypatch.setattr(jt, "code", spy)
    run()
    (shapes,) = asked
    return shapes


def test_a_frozen_weight_costs_no_gradient(monkeypatch):
    three = [(1,), (13,), (13,)]
    assert outputs_of(monkeypatch, Case(SIZES[1], "own").run) == [*three, (13, 37), (97, 37)]
    assert outputs_of(monkeypatch, Case(SIZES[1], "frozen").run) == [*three, (13, 37)]
    assert outputs_of(monkeypatch, Case(SIZES[1], "low_rank").run) == [*three, (13, 37), (13, 5), (97, 5)]


def test_without_gradients_only_losses_and_ranks_are_made(monkeypatch):
    case = Case(SIZES[1], "own")
    expected, found = case.exact(), []

    def score():
        with jt.no_grad():
            known = jt.array(case.targets), jt.array(case.row_weights)
            found.extend(linear_cross_entropy([tuple(jt.array(f) for f in case.factors)], *known))

    assert outputs_of(monkeypatch, score) == [(1,), (13,), (13,)]
    assert farthest([each.numpy() for each in found], expected[:3]) < TOLERANCE


def test_the_losses_to_report_have_no_gradient():
    hidden, weight = jt.array(normal(5, 16)), jt.array(normal(9, 16, seed=1))
    _, losses, _ = linear_cross_entropy([(hidden, weight)], jt.array(np.arange(5, dtype=np.int32)), jt.ones((5,)))
    assert not jt.grad(losses.sum() + 0 * hidden.sum(), hidden).numpy().any()


def test_equal_logits_rank_as_top_k_orders_them():
    weight = np.repeat(normal(40, 16), 5, 0)  # every five tokens have one logit
    hidden, targets = normal(20, 16, seed=1), np.arange(3, 200, 10).astype(np.int32)
    _, _, ranks = linear_cross_entropy([(jt.array(hidden), jt.array(weight))], jt.array(targets), jt.ones((20,)))
    order = top_k(PackedLinear(weight)(jt.array(hidden)), 200)[1].numpy()
    np.testing.assert_array_equal(order[np.arange(20), ranks.numpy()], targets)
    assert (order[np.arange(20), ranks.numpy() - 1] != targets).all()


def test_logits_are_those_of_the_packed_product_bit_for_bit():
    """So a token's rank is the one that drafting gives it: here the three tokens' logits are a rounding apart."""
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


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_all_ignored_give_zeros(kind):
    case = Case(SIZES[1], kind, soft=True)
    total, losses, ranks, *grads = case.run(targets=np.full(13, -100, np.int32))
    assert not total.any() and not losses.any() and (ranks == -1).all()
    assert not any(grad.any() for grad in grads)


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
        assert losses.numpy().max() > 0.1  # what is reported stays the cross-entropy


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_do_not_overflow(scale):
    hidden, weight = np.zeros((2, 16), np.float32), np.zeros((37, 16), np.float32)
    hidden[:, 0], weight[5, 0] = 1, scale
    given = [(jt.array(hidden), jt.array(weight))], jt.array(np.array([5, 6], np.int32)), jt.ones((2,))
    losses = linear_cross_entropy(*given)[1].numpy()
    expected = [0, 1e4] if scale > 0 else [1e4 + np.log(36), np.log(36)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-5)


def test_a_chunk_of_logits_fits_its_memory():
    assert [linear_loss.chunk_rows(vocab) for vocab in (1024, 4096, 32000, 128256, 10**6)] == [1536, 384, 384, 96, 48]
    for vocab in (64, 1000, 50257, 200000):
        assert linear_loss.chunk_rows(vocab) * vocab * 4 <= linear_loss.MOST_BYTES


def test_the_peak_of_memory_stays_below_that_of_all_logits():
    """Three heads of 12,000 tokens over 768 rows: all logits take 111 MB, their gradients as much."""
    words = ("--heads", 3, "--vocab", 12000, "--width", 32, "--positions", 768, "--repeats", 0)
    command = [sys.executable, "bench/losses.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["gradients_agree"]
    if result["full"]["beyond_bytes"] is not None:
        assert result["full"]["beyond_bytes"] > 100e6 and result["memory_ratio"] > 3
