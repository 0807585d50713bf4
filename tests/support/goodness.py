"""Chi-square tests of integer draws against a stated law, cell by cell or in bins."""

import numpy as np
from scipy import stats

ACCEPT = 1e-6  # a right law fails this once in a million runs
REJECT = 1e-9  # a wrong law must do worse than this


def cell_chi_square(draws, first, probabilities):
    """The p-value of draws against P(first + i) = probabilities[i]; rare cells are pooled."""
    expected = np.asarray(probabilities, dtype=float) * draws.size
    index = draws - first
    assert index.min() >= 0 and index.max() < expected.size, "a draw outside the law's support"
    observed = np.bincount(index, minlength=expected.size)
    common = expected >= 10
    pooled_expected = np.append(expected[common], expected[~common].sum() + 1e-12)
    pooled_observed = np.append(observed[common], observed[~common].sum())
    if pooled_expected[-1] < 5:  # too few to judge by chi-square
        if pooled_observed[-1] > 40:
            return 0.0
        pooled_expected, pooled_observed = pooled_expected[:-1], pooled_observed[:-1]
    statistic = ((pooled_observed - pooled_expected) ** 2 / pooled_expected).sum()
    return stats.chi2.sf(statistic, pooled_expected.size - 1)


def binned_chi_square(draws, law, bins=100):
    """The p-value of integer draws against the rounding of a continuous law, in equal bins."""
    edges = np.unique(np.round(law.ppf(np.arange(1, bins) / bins))) + 0.5
    mass = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))
    observed = np.bincount(np.searchsorted(edges, draws), minlength=mass.size)
    return stats.chisquare(observed, mass * draws.size).pvalue


def correlation_in_errors(a, b):
    """Their correlation, in standard errors of what independent samples would show."""
    return abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a))
