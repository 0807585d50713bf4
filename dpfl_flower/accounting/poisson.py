"""The privacy loss of one Poisson-sampled Gaussian release, on a grid, fast.

The same pessimistic distribution as dp-accounting's ``from_gaussian_mechanism`` (tests hold the two
together), whose inversion of the privacy loss, one grid point at a time, is where a calibration
would spend its time; here it is one vector operation.

>>> pld = distribution(0.1, 3.0, replace=False, interval=1e-4)
>>> round(pld.self_compose(512).get_epsilon_for_delta(1e-6), 4)
3.7697
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.lazily import lazily

pld_pmf = lazily("dp_accounting.pld.pld_pmf")
privacy_loss_distribution = lazily("dp_accounting.pld.privacy_loss_distribution")
mechanisms = lazily("dp_accounting.pld.privacy_loss_mechanism")

_Vector = NDArray[np.float64]


def distribution(rate: float, noise_multiplier: float, *, replace: bool, interval: float) -> Any:
    """Return the privacy loss distribution of one release.

    Parameters
    ----------
    rate : float
        The sampling probability, in (0, 1).
    noise_multiplier : float
        Standard deviation / sensitivity under add-or-remove-one, > 0.
    replace : bool
        Whether neighbours differ by replacing a unit, instead of adding, removing or zeroing it.
    interval : float
        The distance of the grid's points.
    """
    if replace:
        pmf = _pmf(rate, noise_multiplier, "REPLACE", interval)
        return privacy_loss_distribution.PrivacyLossDistribution(pmf)
    return privacy_loss_distribution.PrivacyLossDistribution(
        _pmf(rate, noise_multiplier, "REMOVE", interval),
        _pmf(rate, noise_multiplier, "ADD", interval),
    )


def _pmf(rate: float, noise_multiplier: float, adjacency: str, interval: float) -> Any:
    mechanism = mechanisms.GaussianPrivacyLoss(
        noise_multiplier, sampling_prob=rate, adjacency_type=mechanisms.AdjacencyType[adjacency]
    )
    bounds = mechanism.connect_dots_bounds()
    low = math.floor(bounds.epsilon_lower / interval)
    high = math.ceil(bounds.epsilon_upper / interval)
    epsilons = np.arange(low, high + 1) * interval
    deltas = _deltas(mechanism, epsilons)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)


def _deltas(mechanism: Any, epsilons: _Vector) -> _Vector:
    """Return the hockey-stick divergences: mass above the cutoff where the loss is epsilon."""
    log_rest = math.log1p(-mechanism.sampling_prob)
    deltas = np.zeros_like(epsilons)
    inside = np.ones(epsilons.shape, dtype=bool)
    if mechanism.adjacency_type == mechanisms.AdjacencyType.REMOVE:
        inside = epsilons > log_rest  # the loss is never less
        deltas[~inside] = -np.expm1(epsilons[~inside])
    elif mechanism.adjacency_type == mechanisms.AdjacencyType.ADD:
        inside = epsilons < -log_rest  # the loss is never more
    losses = epsilons[inside]
    cutoffs = _cutoffs(mechanism, losses)
    lower = np.exp(losses + mechanism.mu_lower_log_cdf(cutoffs))
    deltas[inside] = mechanism.mu_upper_cdf(cutoffs) - lower
    return _vector(np.clip(deltas, 0.0, 1.0))


def _cutoffs(mechanism: Any, losses: _Vector) -> _Vector:
    """Return the outputs at which the privacy loss takes the given values.

    Solved for x, with l = log(mu_upper(x) / mu_lower(x)), mu the noise and q the rate:
    remove (1-q) mu(x) + q mu(x+1) over mu(x); add mu(x) over (1-q) mu(x) + q mu(x-1);
    replace (1-q) mu(x) + q mu(x+1) over (1-q) mu(x) + q mu(x-1).
    """
    variance = mechanism._standard_deviation**2
    log_rest = math.log1p(-mechanism.sampling_prob)
    log_rate = math.log(mechanism.sampling_prob)
    with np.errstate(divide="ignore"):
        if mechanism.adjacency_type == mechanisms.AdjacencyType.REMOVE:
            unsampled = losses - log_rate + np.log(-np.expm1(log_rest - losses))
            return _vector(-0.5 - unsampled * variance)
        if mechanism.adjacency_type == mechanisms.AdjacencyType.ADD:
            unsampled = losses + log_rate - np.log(-np.expm1(log_rest + losses))
            return _vector(0.5 - unsampled * variance)
        log_alpha = 0.5 / variance + log_rest - log_rate
        half = np.abs(losses) / 2
        log_term = log_alpha + half + np.log(-np.expm1(-2 * half) / 2)
        log_asinh = np.logaddexp(0.5 * np.logaddexp(0.0, 2 * log_term), log_term)
        return _vector(variance * (-np.sign(losses) * log_asinh - losses / 2))


def _vector(values: Any) -> _Vector:
    return np.asarray(values, dtype=np.float64)
