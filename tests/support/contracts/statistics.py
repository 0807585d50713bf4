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
    """Whether centred Gaussian ``draws`` have this standard deviation (chi-square)."""
    statistic = float(np.square(draws / stddev).sum())
    tail = min(stats.chi2.cdf(statistic, draws.size), stats.chi2.sf(statistic, draws.size))
    return tail >= FALSE_ALARM / 2


def laplace_scale_fits(draws: NDArray[np.float64], scale: float) -> bool:
    """Whether centred Laplace ``draws`` have this scale: twice their sum is chi-square."""
    statistic = 2 * float(np.abs(draws / scale).sum())
    tail = min(stats.chi2.cdf(statistic, 2 * draws.size), stats.chi2.sf(statistic, 2 * draws.size))
    return tail >= FALSE_ALARM / 2


def shape_fits(draws: NDArray[np.float64], stddev: float, shape: str = "norm") -> bool:
    """Whether ``draws`` follow a law of this name, mean 0 and this standard deviation (KS)."""
    unit = getattr(stats, shape)
    return stats.kstest(draws * (unit.std() / stddev), shape).pvalue >= FALSE_ALARM


def require_scale(
    draws: NDArray[np.float64],
    stddev: float,
    *,
    allowance: float = 0.0,
    off: float = OFF,
    shape: bool = True,
) -> None:
    """Require Gaussian draws of the stated scale, and that the test would see one 3 % off.

    Parameters
    ----------
    draws : array
    stddev : float
        What is stated.
    allowance : float
        By how much the true scale may exceed the stated one; it may never fall below it.
    off : float
        The wrong scale that must be seen, 1.03.
    shape : bool
        Whether to require the shape of a Gaussian too, and to see that it is no Laplace's. A scale
        3 % off is the chi-square test's to see: KS would need three times as many draws.
    """
    assert np.isfinite(draws).all()
    found = float(np.sqrt(np.mean(draws**2)))
    fits = [scale_fits(draws, stddev * (1 + a)) for a in np.linspace(0, allowance, 5)]
    assert any(fits), f"the standard deviation is {found:.6g}, stated is {stddev:.6g}"
    if shape:
        assert shape_fits(draws, found), "the noise is not Gaussian"
        assert not shape_fits(draws, found, "laplace"), "no power: more draws are needed"
    for wrong in (stddev * off * (1 + allowance), stddev / off):
        assert not scale_fits(draws, wrong), "the test has no power: more draws are needed"


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
