"""Tests of scale and of independence, sharp enough to see 3 % and almost never wrong.

Each threshold is set for a false alarm once in a million runs (4.9 standard errors, two-sided);
every user checks beside it that a wrong scale is rejected.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM = 1e-6
STANDARD_ERRORS = float(stats.norm.isf(FALSE_ALARM / 2))
OFF = 1.03  # a scale this far from the stated one, either way, must be rejected


def scale_fits(draws: NDArray[np.float64], stddev: float) -> bool:
    """Whether centred Gaussian ``draws`` have this standard deviation: chi-square on their squares."""
    statistic = float(np.square(draws / stddev).sum())
    tail = min(stats.chi2.cdf(statistic, draws.size), stats.chi2.sf(statistic, draws.size))
    return tail >= FALSE_ALARM / 2


def shape_fits(draws: NDArray[np.float64], stddev: float) -> bool:
    """Whether ``draws`` follow a Gaussian of mean 0 and this standard deviation (KS)."""
    return stats.kstest(draws / stddev, "norm").pvalue >= FALSE_ALARM


def require_scale(draws: NDArray[np.float64], stddev: float, *, allowance: float = 0.0) -> None:
    """Require Gaussian draws of the stated scale, and that the test would see one 3 % off.

    ``allowance`` is by how much the true scale may exceed the stated one (never fall below it).
    """
    assert np.isfinite(draws).all()
    fits = [scale_fits(draws, stddev * (1 + a)) for a in np.linspace(0, allowance, 5)]
    assert any(fits), f"stddev is {np.sqrt(np.mean(draws**2)):.6g}, must be {stddev:.6g}"
    assert shape_fits(draws, float(np.sqrt(np.mean(draws**2)))), "the noise is not Gaussian"
    for wrong in (stddev * OFF * (1 + allowance), stddev / OFF):
        assert not scale_fits(draws, wrong), "the test has no power: more draws are needed"
        assert not shape_fits(draws, wrong), "the test has no power: more draws are needed"


def cells_fit(
    draws: NDArray[np.int64], cdf: Callable[[NDArray[np.float64]], NDArray[np.float64]], *, cells=60
) -> bool:
    """Whether integer ``draws`` follow the rounding of the law with this ``cdf``: chi-square."""
    edges = np.unique(np.quantile(draws, np.linspace(0, 1, cells + 1)[1:-1]).round()) + 0.5
    observed = np.bincount(np.searchsorted(edges, draws), minlength=edges.size + 1)
    mass = np.diff(np.concatenate([[0.0], cdf(edges), [1.0]]))
    return stats.chisquare(observed, mass * draws.size).pvalue >= FALSE_ALARM


def correlation_in_errors(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the correlation of two samples in standard errors of what independence would show."""
    return abs(float(np.corrcoef(a, b)[0, 1])) * math.sqrt(a.size)


def require_uncorrelated(samples: list[NDArray[np.float64]]) -> None:
    """Require every pair of samples to be uncorrelated; a tenth of one in another would be seen."""
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert correlation_in_errors(a, b) < STANDARD_ERRORS, "two noises are correlated"
    mixed = 0.1 * samples[0] + samples[1]
    assert correlation_in_errors(mixed, samples[0]) > STANDARD_ERRORS, "no power: more draws needed"
