"""Attention, the rotary embedding and the key cache against NumPy in float64 and finite differences."""

import numpy as np
import pytest

import runtime
from ops.attention import attention, rotary
from ops.cache_rows import write_rows
from runtime import jt
from tests.ops.layers import normal

pytestmark = pytest.mark.usefixtures("body")


def inputs(rows, heads, kv_heads, d, tokens, own, scale=1.0):
    """[q, k, v] and, where own > 0, own_k and own_v."""
    arrays = [normal(rows, heads, d) * np.float32(scale), normal(tokens, kv_heads, d, seed=1)]
    arrays.append(normal(tokens, kv_heads, d, seed=2))
    if own:
        arrays += [normal(rows, own, kv_heads, d, seed=3), normal(rows, own, kv_heads, d, seed=4)]
    return arrays


def exact(arrays, first, count, upstream=None):
    """(y, gradients of (y * upstream).sum(), highest score) row by row in float64."""
    q, k, v, *own = (x.astype(np.float64) for x in arrays)
    upstream = np.zeros(q.shape) if upstream is None else upstream
    y, grads, highest = np.zeros(q.shape), [np.zeros(x.shape) for x in (q, k, v, *own)], -np.inf
    group = q.shape[1] // k.shape[1]
    for r in range(q.shape[0]):
        seen = slice(first[r], first[r] + count[r])
        for h in range(q.shape[1]):
            g = h // group
            places = [(k[seen, g], v[seen, g], grads[1][seen, g], grads[2][seen, g])]
            if own:
                places.append((own[0][r, :, g], own[1][r, :, g], grads[3][r, :, g], grads[4][r, :, g]))
            keys, values = (np.concatenate(x) for x in list(zip(*places, strict=True))[:2])
            scores = keys @ q[r, h] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            y[r, h] = weights @ values
            highest = max(highest, scores.max())
            down = upstream[r, h]
            slopes = weights * (values @ down - y[r, h] @ down) / np.sqrt(q.shape[2])
            grads[0][r, h] = slopes @ keys
            start = 0
            for part, _, key_grad, value_grad in places:
                stop = start + len(part)
                key_grad += np.outer(slopes[start:stop], q[r, h])
                value_grad += np.outer(weights[start:stop], down)
                start = stop
    return y, grads, highest


def run(arrays, first, count, upstream):
    """[y, one gradient per array]."""
    q, k, v, *own = xs = [jt.array(x) for x in arrays]
    y = attention(q, k, v, first, count, *own)
    return [y.numpy()] + [g.numpy() for g in jt.grad((y * jt.array(upstream)).sum(), xs)]


def upstream_of(shape):
    """A gradient that comes down to every row. shape: see ``SHAPES``."""
    return normal(shape[0], shape[1], shape[3], seed=5)


def assert_exact(arrays, first, count, upstream, atol=1e-5):
    """Compare with NumPy; returns (what was found, the highest score). Sums of at most 40 x 20 terms below 1, to
    float32."""
    y, grads, highest = exact(arrays, first, count, upstream)
    found = run(arrays, first, count, upstream)
    for got, want in zip(found, [y, *grads], strict=True):
        np.testing.assert_allclose(got, want, atol=atol)
    return found, highest


def int32(*values):
    return np.array(values, np.int32)


def random_ranges(rows, tokens, least=1):
    """Stretches anywhere, some of them several times in a row, as `first` and `count`."""
    rng = np.random.default_rng([rows, tokens])
    first = np.repeat(rng.integers(0, tokens, rows), rng.integers(1, 5, rows))[:rows].astype(np.int32)
    return first, rng.integers(least, tokens - first + 1).astype(np.int32)


def causal(lengths):
    """Packed conversations: every token sees its own up to itself."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts.astype(np.int32), (np.arange(sum(lengths)) - starts + 1).astype(np.int32)


# rows, heads, kv_heads, d, tokens, own: tiles of 16 queries, blocks of 16 keys and panels of 64, 32 and 16 columns on
# the CPU; tiles of 16 and 64 queries, of 32 keys and heads as wide as a multiple of 32 in CUDA.
SHAPES = [
    (37, 4, 4, 64, 100, 5),
    (23, 6, 2, 80, 77, 1),
    (40, 4, 1, 16, 130, 0),
    (9, 2, 2, 8, 33, 3),
    (3, 40, 2, 32, 16, 0),
    (1, 4, 4, 128, 300, 0),
    (1, 2, 1, 64, 1, 0),
    (4, 4, 2, 16, 10, 17),
    (2, 140, 2, 16, 70, 2),
    (5, 2, 1, 160, 40, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_equal_numpy(shape):
    first, count = random_ranges(shape[0], shape[4], least=0 if shape[5] else 1)
    assert_exact(inputs(*shape), first, count, upstream_of(shape))


def test_many_batches_of_tiles_add_up():
    # 600 x 600 x 2 weights: three times what the backward pass holds at a time.
    shape = (600, 2, 2, 16, 600, 0)
    assert_exact(inputs(*shape), np.zeros(600, np.int32), np.full(600, 600, np.int32), upstream_of(shape))


def test_rows_without_shared_keys_see_their_own():
    shape, none = (9, 4, 2, 16, 5, 3), np.zeros(9, np.int32)
    got, _ = assert_exact(inputs(*shape), none, none, upstream_of(shape))
    assert not got[2].any() and not got[3].any() and got[4].all() and got[5].all()


def test_packed_causal_conversations_equal_numpy_and_one_key_more_is_noticed():
    first, count = causal([70, 1, 33, 150])
    rows = len(first)
    shape = (rows, 4, 4, 64, rows, 0)
    arrays, upstream = inputs(*shape), upstream_of(shape)
    right, _ = assert_exact(arrays, first, count, upstream)
    later = np.minimum(count + 1, rows - first).astype(np.int32)
    for got, want in zip(run(arrays, first, later, upstream), right, strict=True):
        assert np.abs(got - want).max() > 0.1
    earlier = np.maximum(first - 1, 0).astype(np.int32)
    assert np.abs(run(arrays, earlier, count, upstream)[0] - right[0]).max() > 0.1


def test_what_runs_first_changes_no_bit(order, monkeypatch):
    shape = (45, 4, 2, 64, 130, 2)  # 90 queries, 130 keys: several tiles of each, some of which all rows see
    first, count = np.zeros(45, np.int32), (100 + np.arange(45) % 31).astype(np.int32)
    got = run(inputs(*shape), first, count, upstream_of(shape))
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", "ascending")
    for a, b in zip(got, run(inputs(*shape), first, count, upstream_of(shape)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradients_agree_with_finite_differences():
    first, count = int32(0, 0, 2), int32(2, 4, 3)
    arrays, upstream = inputs(3, 2, 1, 8, 5, 2), normal(3, 2, 8, seed=5)
    grads = run(arrays, first, count, upstream)[1:]
    rng = np.random.default_rng(0)
    for i, grad in enumerate(grads):
        for _ in range(5):
            index = tuple(rng.integers(0, n) for n in grad.shape)
            sums = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in arrays]
                moved[i][index] += sign * 1e-5
                sums.append((exact(moved, first, count)[0] * upstream).sum())
            assert abs(grad[index] - (sums[0] - sums[1]) / 2e-5) < 1e-5, (i, index)


def test_scores_whose_exponential_overflows_are_fine():
    shape = (20, 2, 2, 64, 60, 3)
    # Scores to 200 are known to 1e-5, q multiplies by 200.
    _, highest = assert_exact(inputs(*shape, scale=60.0), *random_ranges(20, 60), upstream_of(shape), atol=2e-3)
    assert highest > 100  # float32 ends at exp(88.7)


def test_what_no_row_sees_gets_no_gradient_and_may_be_anything():
    arrays, upstream = inputs(6, 2, 2, 16, 50, 0), normal(6, 2, 16, seed=5)
    first, count = int32(3, 3, 3, 20, 21, 20), int32(4, 2, 5, 10, 9, 1)
    seen = np.zeros(50, bool)
    seen[3:8] = seen[20:30] = True
    want = run(arrays, first, count, upstream)
    for x in arrays[1:]:
        x[~seen] = np.nan
    got = run(arrays, first, count, upstream)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not got[2][~seen].any() and not got[3][~seen].any() and got[2][seen].all() and got[3][seen].all()


def test_a_row_gets_the_same_bits_alone_as_among_others():
    arrays = inputs(37, 4, 2, 64, 100, 5)
    first, count = random_ranges(37, 100)
    q, k, v, own_k, own_v = arrays
    together = attention(*(jt.array(x) for x in (q, k, v)), first, count, jt.array(own_k), jt.array(own_v)).numpy()
    for r in (0, 7, 36):
        one = slice(r, r + 1)
        alone = attention(
            *(jt.array(x) for x in (q[one], k, v)), first[one], count[one], jt.array(own_k[one]), jt.array(own_v[one])
        )
        np.testing.assert_array_equal(alone.numpy()[0], together[r])


def set_threads(number: int) -> int:
    """Set OpenMP's thread count where the kernels run; returns what it was."""
    return int(
        jt.code(
            (1,),
            "int32",
            [jt.array([0])],
            cpu_header="#include <omp.h>",
            cpu_src='out0_p[0] = omp_get_max_threads(); omp_set_num_threads((int)data["number"]);',
            data={"number": number},
        ).item()
    )


def test_the_number_of_threads_changes_no_bit(body):
    if body != "cpu":
        pytest.skip("the number of OpenMP's threads")
    first, count = causal([200, 60, 120])
    shape = (len(first), 4, 2, 64, len(first), 3)
    before = set_threads(1)
    try:
        one = run(inputs(*shape), first, count, upstream_of(shape))
        assert set_threads(3) == 1
        three = run(inputs(*shape), first, count, upstream_of(shape))
        assert set_threads(before) == 3
    finally:
        set_threads(before)
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("first, count", [((0, 5), (1, 5)), ((-1, 0), (2, 1)), ((0, 0), (1, 0)), ((0, 0), (2, -1))])
def test_a_range_outside_the_keys_is_refused(first, count):
    xs = [jt.array(x) for x in inputs(2, 2, 2, 16, 9, 0)]
    with pytest.raises(AssertionError):
        attention(*xs, int32(*first), int32(*count))
    if runtime.device == "cuda":
        return  # the kernel would trap, and no test could use the GPU any more
    with pytest.raises(RuntimeError, match="must name keys that there are"):
        attention(*xs, jt.array(int32(*first)), jt.array(int32(*count))).sync()


# The rotary embedding


def angles(rows, half):
    angle = np.arange(3, 3 + rows)[:, None] * 100.0 ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def turned(x, cosine, sine):
    """The first half as real parts, the second as imaginary ones, times exp(i angle)."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * (cosine + 1j * sine)[:, None]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("size", [(5, 3, 10), (300, 2, 64)])  # the second runs in parallel
def test_rotary_turns_pairs_and_its_gradient_turns_back(size):
    x, upstream = normal(*size), normal(*size, seed=1)
    cosine, sine = angles(size[0], size[2] // 2)
    var = jt.array(x)
    y = rotary(var, jt.array(cosine), jt.array(sine))
    gradient = jt.grad((y * jt.array(upstream)).sum(), var).numpy()
    np.testing.assert_allclose(y.numpy(), turned(x, cosine, sine), atol=1e-6)
    np.testing.assert_allclose(gradient, turned(upstream, cosine, -sine), atol=1e-6)
    assert np.abs(gradient - turned(upstream, cosine, sine)).max() > 0.1


# The key cache


@pytest.mark.parametrize("width", [5, 8])  # 16 bytes at a time, or not
def test_rows_are_written_where_the_cache_lies_and_nowhere_else(width):
    cache, rows = jt.array(normal(9, 2, width)), normal(3, 2, width, seed=1)
    want = normal(9, 2, width)
    view = cache.data if runtime.device == "cpu" else None  # the memory itself
    write_rows(cache, jt.array(rows), 4)
    want[4:7] = rows
    if view is not None:
        np.testing.assert_array_equal(view, want)
    np.testing.assert_array_equal(cache.numpy(), want)
    write_rows(cache, jt.array(rows), 6)
    want[6:9] = rows
    np.testing.assert_array_equal(cache.numpy(), want)
    write_rows(cache, jt.zeros((0, 2, width)), 9)
    np.testing.assert_array_equal(cache.numpy(), want)


@pytest.mark.parametrize("shape, base", [((3, 2, 5), 7), ((3, 2, 5), -1), ((3, 5, 2), 0), ((10, 2, 5), 0)])
def test_rows_that_do_not_fit_are_refused(shape, base):
    cache = jt.zeros((9, 2, 5))
    with pytest.raises(ValueError, match="do not fit"):
        write_rows(cache, jt.ones(shape), base)
    assert not cache.numpy().any()
