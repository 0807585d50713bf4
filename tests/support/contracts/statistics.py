"""Tests of scale, of counts and of independence, sharp enough to see 3 % and almost never wrong.

Each comparison may raise a false alarm once in a hundred million (5.7 standard errors, two-sided),
and helpers that make many comparisons share that among them, so that a test function which makes
a dozen of them fails by chance less than once in a million runs. Where a wrong law must be
rejected, the chance to miss it is computed and must be as small.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM = 1e-8
STANDARD_ERRORS = float(stats.norm.isf(FALSE_ALARM / 2))
OFF = 1.03  # a scale this far from the stated one, either way, must be rejected

Cdf = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Law:
    """A centred law with density proportional to exp(-|x / scale|^power / power)."""

    name: str
    power: int


GAUSSIAN = Law("norm", 2)  # its scale is the standard deviation
LAPLACE = Law("laplace", 1)


def scale_fits(
    draws: NDArray[np.float64],
    scale: float,
    *,
    highest: float | None = None,
    law: Law = GAUSSIAN,
    false_alarm: float = FALSE_ALARM,
) -> bool:
    """Whether ``draws`` of ``law`` have this scale, or one between it and ``highest``.

    Exact: 2 / power * sum |x / scale|^power is chi-square with 2 n / power degrees of freedom.
    """
    degrees = 2 * draws.size // law.power
    size = np.abs(draws)
    above = 2 / law.power * float(((size / scale) ** law.power).sum())
    below = 2 / law.power * float(((size / (highest or scale)) ** law.power).sum())
    tail = min(stats.chi2.cdf(above, degrees), stats.chi2.sf(below, degrees))
    return bool(tail >= false_alarm / 2)


def laplace_scale_fits(draws: NDArray[np.float64], scale: float) -> bool:
    """Whether centred Laplace ``draws`` have this scale."""
    return scale_fits(draws, scale, law=LAPLACE)


def chance_to_miss(n: int, off: float, *, law: Law = GAUSSIAN) -> float:
    """Return how likely ``n`` draws let a scale pass that is ``off`` times theirs, or one by it."""
    degrees = 2 * n // law.power
    ratio = off**law.power
    low, high = stats.chi2.ppf(FALSE_ALARM / 2, degrees), stats.chi2.isf(FALSE_ALARM / 2, degrees)
    return float(max(stats.chi2.sf(low * ratio, degrees), stats.chi2.cdf(high / ratio, degrees)))


def shape_fits(draws: NDArray[np.float64], stddev: float, shape: str = "norm") -> bool:
    """Whether ``draws`` follow a law of this name, mean 0 and this standard deviation (KS)."""
    unit = getattr(stats, shape)
    return bool(stats.kstest(draws * (unit.std() / stddev), shape).pvalue >= FALSE_ALARM)


def require_scale(
    draws: NDArray[np.float64],
    stddev: float,
    *,
    allowance: float = 0.0,
    off: float = OFF,
    shape: bool = True,
) -> None:
    """Require Gaussian draws of the stated scale, and that the test would see one 3 % off.

    False alarm: 1e-8 for the scale, 1e-8 for the shape. The chance to miss each wrong scale is
    required to be below 1e-8; it takes 75,000 draws for 3 %.

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
    missed = chance_to_miss(draws.size, off)
    assert missed < FALSE_ALARM, f"{draws.size} draws miss a wrong scale with probability {missed}"
    found = float(np.sqrt(np.mean(draws**2)))
    highest = stddev * (1 + allowance)
    fits = scale_fits(draws, stddev, highest=highest)
    assert fits, f"the standard deviation is {found:.6g}, stated is {stddev:.6g}"
    if shape:
        assert shape_fits(draws, found), "the noise is not Gaussian"
        assert not shape_fits(draws, found, "laplace"), "no power: more draws are needed"
    for wrong in (highest * off, stddev / off):
        assert not scale_fits(draws, wrong), "the test has no power: more draws are needed"


def cells_fit(draws: NDArray[np.int64], cdf: Cdf, *, cells: int = 60) -> bool:
    """Whether integer ``draws`` follow the rounding of the law with this ``cdf``: chi-square.

    It sees any other shape; a scale 3 % off is `require_scale_of_law`'s to see.
    """
    edges = np.unique(np.quantile(draws, np.linspace(0, 1, cells + 1)[1:-1]).round()) + 0.5
    observed, mass = _in_cells(draws, edges, cdf)
    return bool(stats.chisquare(observed, mass * draws.size).pvalue >= FALSE_ALARM)


def require_scale_of_law(
    draws: NDArray[np.int64], law: Callable[[float, NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    """Require integer ``draws`` of the stated scale, whatever their law, and to see 3 % off.

    Parameters
    ----------
    draws : int64 array
    law : function
        ``law(scale, x)``: P(draw before rounding <= x) when its scale is so many times the stated.

    Notes
    -----
    The log-likelihood ratio of 1.03 against 1 / 1.03, over 400 cells: the most powerful statistic
    there is between the two (Neyman and Pearson), but for what the cells hide. It is a sum of n
    bounded terms, so normal; with 200,000 draws the nearer of the two is 18 standard errors away
    for a Gaussian and 13 for a Laplace.
    """
    edges = _quantiles(lambda x: law(1.0, x), np.arange(1, 400) / 400) + 0.5
    mass = {}
    for scale in (1.0, OFF, 1 / OFF):
        observed, mass[scale] = _in_cells(draws, edges, lambda x, scale=scale: law(scale, x))
    weight = np.log(mass[OFF] / mass[1 / OFF])
    found = float(observed @ weight)

    def moments(scale: float) -> tuple[float, float]:
        mean = float(mass[scale] @ weight)
        variance = float(mass[scale] @ weight**2) - mean**2
        return mean * draws.size, math.sqrt(variance * draws.size)

    right, error = moments(1.0)
    assert abs(found - right) <= STANDARD_ERRORS * error, "the noise has another scale than stated"
    for scale in (OFF, 1 / OFF):
        wrong, wrong_error = moments(scale)
        room = (abs(wrong - right) - STANDARD_ERRORS * wrong_error) / error
        assert stats.norm.sf(room) < FALSE_ALARM, "no power: more draws are needed"
        assert abs(found - wrong) > STANDARD_ERRORS * wrong_error


def _in_cells(
    draws: NDArray[np.int64], edges: NDArray[np.float64], cdf: Cdf
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return how many draws are in each cell, and what its probability is."""
    observed = np.bincount(np.searchsorted(edges, draws), minlength=edges.size + 1)
    return observed, np.diff(np.concatenate([[0.0], cdf(edges), [1.0]]))


def _quantiles(cdf: Cdf, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the different integers at these quantiles, found by bisection."""
    low, high = np.full(levels.size, -(2.0**40)), np.full(levels.size, 2.0**40)
    for _ in range(42):
        middle = np.floor((low + high) / 2)
        below = cdf(middle) < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.unique(high)


# --- counts ---------------------------------------------------------------------------------------


def counts_fit(observed: NDArray[np.int64], trials: int, probability: float | NDArray) -> bool:
    """Whether each count is a binomial's of so many trials: exact, false alarm 1e-8 for all."""
    observed = np.asarray(observed)
    p = np.clip(probability, 0.0, 1.0)
    at_most = stats.binom.cdf(observed, trials, p)
    at_least = stats.binom.sf(observed - 1, trials, p)
    return bool(np.minimum(at_most, at_least).min() >= FALSE_ALARM / 2 / observed.size)


def law_of_sum(values: NDArray[np.int64], probabilities: NDArray, n: int) -> NDArray[np.float64]:
    """Return P(sum = 0, 1, ...) of ``n`` independent draws of ``values``, integers >= 0.

    The n-fold convolution by FFT, whose errors are some 1e-15 in all.
    """
    one = np.bincount(values, weights=probabilities)
    size = 2 ** math.ceil(math.log2(n * (one.size - 1) + 1))
    return np.fft.irfft(np.fft.rfft(one, size) ** n, size)


def sum_fits(found: int, law: NDArray[np.float64]) -> bool:
    """Whether ``found`` may be a sum of this law."""
    return bool(min(law[: found + 1].sum(), law[found:].sum()) >= FALSE_ALARM / 2)


# --- independence ---------------------------------------------------------------------------------


def correlation_in_errors(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the correlation of two samples in standard errors of what independence would show."""
    return abs(float(np.corrcoef(a, b)[0, 1])) * math.sqrt(a.size)


def require_uncorrelated(samples: list[NDArray[np.float64]]) -> None:
    """Require every pair of samples to be uncorrelated; a tenth of one in another would be seen.

    False alarm: 1e-8 for all pairs together. A tenth of one in another moves their correlation by
    14 standard errors at 20,000 draws, which is missed less than once in 1e14 among 28 pairs.
    """
    pairs = len(samples) * (len(samples) - 1) // 2
    allowed = float(stats.norm.isf(FALSE_ALARM / 2 / pairs))
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert correlation_in_errors(a, b) < allowed, "two noises are correlated"
    mixed = 0.1 * samples[0] + samples[1]
    assert correlation_in_errors(mixed, samples[0]) > allowed, "no power: more draws needed"
