"""The G-test of counts against a distribution, shared by the tests of everything that draws."""

import numpy as np
from scipy.stats import power_divergence

# A p-value above the first passes; below the second, a defect is seen beyond doubt.
LEVEL, CERTAIN = 0.01, 1e-6


def g_test(counts, expected):
    """The p-value of counts against expected ones, arrays of one shape. Cells too rare for the test are merged; a count
    where none is expected fails at once."""
    counts, expected = np.asarray(counts, np.float64).reshape(-1), np.asarray(expected, np.float64).reshape(-1)
    assert (counts[expected == 0] == 0).all(), "something came that has probability 0"
    rare = expected < 5
    if rare.any() and expected[rare].sum() > 0:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    assert len(expected) > 3
    return power_divergence(counts, expected, lambda_="log-likelihood").pvalue
