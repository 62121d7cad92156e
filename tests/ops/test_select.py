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


@pytest.mark.parametrize(("width", "k"), [(10, 1), (10, 10), (16, 2), (31, 3), (31, 9), (100, 5), (100, 8), (1003, 7)])
def test_top_k_equals_a_stable_sort_ties_in_the_order_of_their_index(width, k):
    random = np.random.default_rng([width, k])
    different = random.standard_normal((5, width)).astype(np.float32)
    equal = random.integers(0, 4, (7, width)).astype(np.float32)
    equal[0] = 0
    equal[1] = np.arange(width)  # ascending: every entry displaces another
    equal[2] = -np.arange(width)
    for logits in (different, equal):
        together = found(top_k, logits, k)
        for got, want in zip(together, expected(logits, k), strict=True):
            np.testing.assert_array_equal(got, want)
        for row in (0, len(logits) - 1):  # a row selects alone what it selects among others
            for alone, beside in zip(found(top_k, logits[row : row + 1], k), together, strict=True):
                np.testing.assert_array_equal(alone[0], beside[row])
    if 1 < k < width:  # control: ties in another order
        last_first = width - 1 - np.argsort(-equal[:, ::-1], axis=1, kind="stable")[:, :k]
        assert (last_first != found(top_k, equal, k)[1]).any()


def test_argmax_is_the_first_of_the_largest():
    logits = np.array([[1, 3, 3, 2], [-5, -5, -7, -5], [0, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(argmax(jt.array(logits)).numpy(), [1, 0, 3])


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
