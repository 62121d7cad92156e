"""Top-k without a full sort picks what a stable sort picks, ties by index."""

import numpy as np
import pytest

from ops.select import argmax, top_k, top_k_log_probabilities
from runtime import jt

pytestmark = pytest.mark.usefixtures("body")
WIDTHS = [10, 16, 31, 100, 1003]


def expected(logits, k):
    """By a stable sort of the negated values: the largest first, equal ones in the order of their index."""
    indices = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(logits, indices, 1), indices


def found(function, logits, k):
    values, indices = function(jt.array(logits), k)
    return values.numpy(), indices.numpy()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", range(1, 11))
def test_top_k_equals_a_stable_sort(width, k):
    logits = np.random.default_rng([width, k]).standard_normal((5, width)).astype(np.float32)
    for got, want in zip(found(top_k, logits, k), expected(logits, k), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 4, 10])
def test_equal_values_come_in_the_order_of_their_index(width, k):
    logits = np.random.default_rng([width, k]).integers(0, 4, (7, width)).astype(np.float32)
    logits[0] = 0  # all equal
    logits[1] = np.arange(width)  # ascending: every entry displaces another
    logits[2] = -np.arange(width)
    values, indices = found(top_k, logits, k)
    np.testing.assert_array_equal(indices, expected(logits, k)[1])
    np.testing.assert_array_equal(values, expected(logits, k)[0])
    np.testing.assert_array_equal(indices[0], np.arange(k))


def test_the_check_notices_ties_in_another_order():
    logits = np.random.default_rng(0).integers(0, 4, (7, 31)).astype(np.float32)
    last_first = 30 - np.argsort(-logits[:, ::-1], axis=1, kind="stable")[:, :4]
    assert (last_first != found(top_k, logits, 4)[1]).any()


def test_a_row_selects_alone_what_it_selects_among_others():
    logits = np.random.default_rng(3).standard_normal((9, 100)).astype(np.float32)
    together = found(top_k, logits, 5)
    for row in range(9):
        for alone, beside in zip(found(top_k, logits[row : row + 1], 5), together, strict=True):
            np.testing.assert_array_equal(alone[0], beside[row])


def test_argmax_is_the_first_of_the_largest():
    logits = np.array([[1, 3, 3, 2], [-5, -5, -7, -5], [0, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(argmax(jt.array(logits)).numpy(), [1, 0, 3])


@pytest.mark.parametrize("k", [0, 5])
def test_more_candidates_than_columns_are_refused(k):
    with pytest.raises(AssertionError):
        top_k(jt.array(np.zeros((1, 4), np.float32)), k)


@pytest.mark.parametrize("width", WIDTHS)
def test_log_probabilities_of_the_best_are_those_of_the_softmax(width):
    logits = np.random.default_rng(width).standard_normal((5, width)).astype(np.float32) * 5
    logits[0, 3] = 200  # certain: its logarithm must not come out above 0
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(1, keepdims=True)
    values, indices = found(top_k_log_probabilities, logits, 4)
    np.testing.assert_array_equal(indices, expected(logits, 4)[1])
    assert np.abs(values - np.take_along_axis(exact, indices, 1)).max() < 1e-4
    assert values.max() <= 0 and values[0, 0] == 0
