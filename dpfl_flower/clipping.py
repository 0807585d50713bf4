"""How far one unit may move the sum: norms, and how the clip norm is chosen.

>>> import numpy as np
>>> norm([np.array([3e30]), np.array(4e30)])
5e+30
>>> AdaptiveClipping(initial=0.1).updated(0.1, 0.0)  # nobody fits: the clip norm grows
0.11051709180756478
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import final

import numpy as np

from dpfl_flower import checks
from dpfl_flower.layout import Array, as_numpy

__all__ = ["AdaptiveClipping", "ClippingPolicy", "FixedClipping", "Norm", "norm"]

_BLOCK = 1 << 13  # short enough for BLAS not to wake its threads


class Norm(StrEnum):
    """The norm that bounds a unit: L2 for Gaussian noise, L1 for Laplace noise."""

    L1 = "l1"
    L2 = "l2"


def norm(arrays: Iterable[Array], kind: Norm = Norm.L2) -> float:
    """Return the norm of the concatenation of ``arrays``, computed in float64.

    Entries are scaled by the largest where squares would overflow or vanish, so that 1e-200 and
    1e200 both count. NaN anywhere gives NaN, otherwise infinity anywhere gives infinity.
    """
    flats = [flat for array in arrays if (flat := as_numpy(array).reshape(-1)).size]
    with np.errstate(all="ignore"):
        ends = [float(end) for flat in flats for end in (flat.max(), -flat.min())]
        if any(map(math.isnan, ends)):
            return math.nan
        peak = max(ends, default=0.0)
        if peak in (0.0, math.inf):
            return peak
        # A power of two, so that scaling rounds nothing.
        exponent = 0 if 1e-100 < peak < 1e100 else -math.frexp(peak)[1]
        scale = math.ldexp(1.0, min(max(exponent, -1000), 1000))
        total = 0.0
        for flat in flats:
            for start in range(0, flat.size, _BLOCK):
                block = flat[start : start + _BLOCK].astype(np.float64)
                if scale != 1.0:
                    block *= scale
                total += float(block @ block if kind is Norm.L2 else np.abs(block).sum())
        return (math.sqrt(total) if kind is Norm.L2 else total) / scale


class ClippingPolicy(ABC):
    """How the clip norm is chosen, round by round."""

    @property
    @abstractmethod
    def initial_clip_norm(self) -> float:
        """The clip norm of the first round."""


@final
@dataclass(frozen=True)
class FixedClipping(ClippingPolicy):
    """The same clip norm in every round.

    Attributes
    ----------
    clip_norm : float
        In the units of the update. ValueError unless it is finite and > 0.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        checks.positive(clip_norm=self.clip_norm)

    @property
    def initial_clip_norm(self) -> float:
        """The clip norm of every round."""
        return self.clip_norm


@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping(ClippingPolicy):
    """A clip norm that follows a quantile of the update norms, privately.

    Every unit also says whether its *unclipped* norm was within the clip norm; the noisy fraction
    that was, b, moves it: ``C <- C exp(-learning_rate (b - quantile))``. Source: Andrew, Thakkar,
    McMahan, Ramaswamy, arXiv 1905.03871, Algorithm 1.

    Attributes
    ----------
    initial : float
        Clip norm of the first round.
    quantile : float
        Fraction of the units that should fit.
    learning_rate : float
        Step of the geometric update (eta_C).
    indicator_noise : float or None
        Standard deviation s_b of the noise on the sum of the indicators ``b_k - 1/2``; None for
        ``max(expected_cohort / 20, noise_multiplier)``.
    minimum, maximum : float
        Bounds of the clip norm. Dropouts pull the noisy fraction towards 1/2, which lets the clip
        norm drift without end when the quantile is not 1/2.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    initial: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    indicator_noise: float | None = None
    minimum: float = 1e-6
    maximum: float = 1e6

    def __post_init__(self) -> None:
        checks.positive(
            initial=self.initial,
            learning_rate=self.learning_rate,
            minimum=self.minimum,
            maximum=self.maximum,
        )
        checks.probability(quantile=self.quantile)
        if self.indicator_noise is not None:
            checks.positive(indicator_noise=self.indicator_noise)
        checks.at_most(self.maximum, initial=self.initial, minimum=self.minimum)
        checks.at_most(self.initial, minimum=self.minimum)

    @property
    def initial_clip_norm(self) -> float:
        """The clip norm of the first round."""
        return self.initial

    def indicator_stddev(self, noise_multiplier: float, expected_cohort: float) -> float:
        """Return s_b, the standard deviation of the noise on the sum of ``b_k - 1/2``.

        Raises
        ------
        ValueError
            When ``noise_multiplier >= 2 s_b``: then the indicator alone would need more than the
            whole budget (arXiv 1905.03871, Theorem 1).
        """
        checks.non_negative(noise_multiplier=noise_multiplier)
        checks.positive(expected_cohort=expected_cohort)
        stddev = self.indicator_noise
        if stddev is None:
            stddev = max(expected_cohort / 20, noise_multiplier)
        if noise_multiplier >= 2 * stddev:
            raise ValueError(
                f"noise_multiplier={noise_multiplier!r} must be < 2 * indicator_noise "
                f"= {2 * stddev!r}: raise indicator_noise or lower noise_multiplier"
            )
        return stddev

    def update_noise_multiplier(self, noise_multiplier: float, expected_cohort: float) -> float:
        """Return z_D, the noise on the update alone, in clip norms, when the release has z.

        ``z_D = (z^-2 - (2 s_b)^-2)^(-1/2)``: arXiv 1905.03871, Theorem 1. It is a little above z,
        which is what pays for the indicator.

        >>> AdaptiveClipping(indicator_noise=5.0).update_noise_multiplier(1.0, 100)
        1.005037815259212
        """
        stddev = self.indicator_stddev(noise_multiplier, expected_cohort)
        checks.positive(noise_multiplier=noise_multiplier)
        return float((noise_multiplier**-2 - (2 * stddev) ** -2) ** -0.5)

    def updated(self, clip_norm: float, noisy_fraction: float) -> float:
        """Return the next clip norm, within [minimum, maximum].

        Parameters
        ----------
        clip_norm : float
            The clip norm that this round used.
        noisy_fraction : float
            The released fraction of units that fit; the noise may carry it below 0 or above 1.
        """
        checks.positive(clip_norm=clip_norm)
        exponent = -self.learning_rate * (noisy_fraction - self.quantile)
        moved = clip_norm * math.exp(min(max(exponent, -500.0), 500.0))  # exp stays finite
        return min(max(moved, self.minimum), self.maximum)
