"""Temperature, top-k and the nucleus by definition, and draws that follow the distribution."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.sampling import RAREST, Sampler, draw, draw_without_replacement, softmax
from tests.g_test import CERTAIN, LEVEL, g_test


def logits_of(*probabilities):
    """One row of logits whose softmax at temperature 1 this is."""
    return np.log(np.array([probabilities]))


def left(sampler, *probabilities):
    return sampler.probabilities(logits_of(*probabilities))[0].tolist()


def test_the_worked_example():
    sampler = Sampler(top_k=3, top_p=0.8)
    assert left(sampler, 0.1, 0.4, 0.4, 0.1) == pytest.approx([0, 0.5, 0.5, 0])


def test_temperature_divides_the_logits():
    assert left(Sampler(0.5), 0.2, 0.8) == pytest.approx([0.04 / 0.68, 0.64 / 0.68])
    assert left(Sampler(1e6), 0.2, 0.8) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_temperature_0_gives_the_first_of_the_largest():
    rows = Sampler(0).probabilities(np.array([[1, 3, 3, 2], [5, 1, 1, 1]], np.float32))
    assert rows.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]] and rows.dtype == np.float64


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature):
    with np.errstate(all="raise", under="ignore"):
        assert Sampler(temperature).probabilities(np.array([[1, 3, 2], [0, -9, 5]])).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_of_equals_top_k_and_the_nucleus_keep_those_with_the_lowest_index():
    assert left(Sampler(top_k=2), 0.2, 0.4, 0.2, 0.2) == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert left(Sampler(top_p=0.5), 0.2, 0.4, 0.2, 0.2) == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert left(Sampler(top_k=1), 0.25, 0.25, 0.25, 0.25) == [1, 0, 0, 0]


def test_the_nucleus_is_of_the_tokens_that_top_k_left():
    # Of [.5 .3 .2] the nucleus of .6 is the first two; of top-k's [.625 .375] it is the first alone.
    assert left(Sampler(top_p=0.6), 0.5, 0.3, 0.2) == pytest.approx([0.625, 0.375, 0])
    assert left(Sampler(top_p=0.6, top_k=2), 0.5, 0.3, 0.2) == [1, 0, 0]


def test_one_token_always_stays():
    assert left(Sampler(top_p=1e-12), 0.3, 0.5, 0.2) == [0, 1, 0]


def test_settings_that_keep_every_token_change_nothing():
    rows = np.random.default_rng(0).normal(0, 3, (5, 50)).astype(np.float32)
    for sampler in (Sampler(), Sampler(top_k=50), Sampler(top_k=80), Sampler(top_k=0, top_p=1.0)):
        assert np.array_equal(sampler.probabilities(rows), softmax(rows, 1.0))


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.051, 0.531, 0.917, 0.999, 1.0]),
    st.integers(0, 13),
)
def test_the_sampler_is_its_definition(logits, temperature, top_p, top_k):
    """Sort, cut, renormalize, one step after another, on whole numbers, so that there are ties."""
    row = Sampler(temperature, top_p, top_k).probabilities(np.array([logits]))[0]
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    shares, nucleus = weights[order] / weights[order].sum(), []
    for token, before in zip(order, [0, *np.cumsum(shares)[:-1]], strict=True):
        if before < top_p or top_p == 1:
            nucleus.append(token)
    expected = np.zeros(len(logits))
    expected[nucleus] = weights[nucleus] / weights[nucleus].sum()
    assert row == pytest.approx(expected, abs=1e-12) and row.sum() == pytest.approx(1)
    assert (row[expected == 0] == 0).all()


def test_each_row_is_computed_alone():
    rows = np.random.default_rng(1).normal(0, 2, (4, 30)).astype(np.float32)
    sampler = Sampler(0.8, 0.9, 12)
    alone = [sampler.probabilities(row[None])[0] for row in rows]
    assert np.array_equal(sampler.probabilities(rows), alone)


def test_settings_that_make_no_sampler_are_refused():
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be a finite number from 0"):
            Sampler(value)
    for value in (0, -0.5, 1.0001, float("nan")):
        with pytest.raises(ValueError, match="top_p must lie above 0 and be at most 1"):
            Sampler(top_p=value)
    for value in (-1, 2.5):
        with pytest.raises(ValueError, match="top_k must be a whole number from 0"):
            Sampler(top_k=value)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(temperature, value):
    with pytest.raises(ValueError, match="the logits hold nan or infinity"):
        Sampler(temperature).probabilities(np.array([[0.0, 1.0], [value, 1.0]]))


def test_tokens_masked_with_minus_infinity_are_never_drawn():
    assert Sampler().probabilities(np.array([[-np.inf, 0.0, 0.0]])).tolist() == [[0, 0.5, 0.5]]


class Rolls:
    """A generator whose next uniform numbers are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_a_token_of_probability_0_is_never_drawn():
    row = np.array([0, 0.25, 0, 0.75, 0])
    almost = np.nextafter(1, 0)
    assert [draw(row, Rolls(u)) for u in (0.0, 0.249, 0.25, 0.5, almost)] == [1, 1, 3, 3, 3]
    assert draw(np.array([0.5 - 2**-54, 0.0]), Rolls(almost)) == 0  # the product rounds up to the sum


def test_draws_follow_the_distribution():
    row, rng = np.array([0.5, 0.2, 0.0, 0.25, 0.05]), np.random.default_rng(0)
    counts = np.bincount([draw(row, rng) for _ in range(20_000)], minlength=5)
    assert g_test(counts, 20_000 * row) > LEVEL
    assert g_test(counts, 20_000 * np.array([0.48, 0.22, 0, 0.25, 0.05])) < CERTAIN  # the control: one nearby


def test_draws_without_replacement_are_draws_one_after_another():
    row, rng, pairs = np.array([0.5, 0.2, 0.0, 0.25, 0.05]), np.random.default_rng(0), {}
    for _ in range(20_000):
        pair = tuple(draw_without_replacement(row, 2, rng).tolist())
        pairs[pair] = pairs.get(pair, 0) + 1
    possible = [pair for pair in itertools.permutations(range(5), 2) if 2 not in pair]
    expected = {(a, b): 20_000 * row[a] * row[b] / (1 - row[a]) for a, b in possible}
    assert set(pairs) <= set(expected)
    counts = [pairs.get(pair, 0) for pair in expected]
    assert g_test(counts, list(expected.values())) > LEVEL
    swapped = [expected[b, a] for a, b in expected]  # the control: the order of the two matters
    assert g_test(counts, swapped) < CERTAIN


def test_tokens_of_probability_0_come_last():
    row, rng = np.array([0.0, 0.7, 0.0, 0.3]), np.random.default_rng(0)
    for _ in range(50):
        tokens = draw_without_replacement(row, 4, rng).tolist()
        assert set(tokens[:2]) == {1, 3} and sorted(tokens) == [0, 1, 2, 3]


def test_probabilities_below_the_rarest_are_0():
    row = softmax(np.array([[0.0, -0.6, -0.72, -0.9]]), 0.001)[0]
    assert row[0] == 1 and row[1] >= RAREST and row[2] == row[3] == 0
