"""The integer grid: how many units the noise, the clip norm and the enforced bound have.

The noise has a standard deviation of s units, s a power of two fixed for a run. A unit clipped to
the clip norm has S units before rounding; rounding lengthens it, so what is enforced, and what the
accounting charges, is the slightly larger integer S_int. Only the real size of a grid unit follows
the clip norm from round to round.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 1_000_000)
>>> grid.noise_units, grid.sensitivity_units, round(grid.clip_units, 1)
(16384, 16384, 16377.7)
>>> grid.noise_multiplier
1.0
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.clipping import Norm
from dpfl_flower.quantize.dither import PERIOD

__all__ = ["USUAL_NOISE_UNITS", "IntegerGrid", "Rounding", "to_float"]

USUAL_NOISE_UNITS = 1 << 14
"""The noise's standard deviation s on the coarsest grid, unless a coarser one is asked for."""

_LARGEST_NOISE_UNITS = 1 << 17
_CLIP_UNITS_WITHOUT_NOISE = float(1 << 24)
_METRIC_UNITS_WITHOUT_NOISE = 1 << 20
LARGEST_SENSITIVITY_UNITS = 1 << 26
"""Its square stays below 2^53, so that float64 sums of squares of integers are exact."""

_LARGEST_SQUARED_BOUND = 1 << 53

_HONEST_FAILURE = 1e-12
"""How often rounding may carry an honest unit of norm exactly C over the bound: it is shrunk."""

_SPREAD = math.sqrt(2 * math.log(1 / _HONEST_FAILURE))


class Rounding(StrEnum):
    """How reals become integers.

    NEAREST moves each entry by at most half a unit, and loses what is smaller in every round.
    DITHERED adds a public number, uniform in (-1/2, 1/2), first: unbiased over rounds. It is
    floor(x + u), u uniform in (0, 1).
    """

    NEAREST = "nearest"
    DITHERED = "dithered"


@dataclass(frozen=True)
class IntegerGrid:
    """Grid units of the noise, the clip norm and the bound.

    Attributes
    ----------
    dimension : int
        Length d of one unit's update: of its vector without the indicator and the metrics.
    noise_units : int
        Standard deviation s of the noise (its scale for Laplace noise); 0 for no noise.
    clip_units : float
        S: what the clip norm measures in grid units.
    sensitivity_units : int
        S_int: enforced on every unit's rounded vector q, as sum of q^2 <= S_int^2 (L2) or
        sum of abs(q) <= S_int (L1).
    indicator_units : int
        K: a unit also sends +K when its unclipped norm was within the clip norm, else -K.
        0: it sends no indicator.
    norm : Norm
    rounding : Rounding
    num_metrics : int
        m: how many bounded metrics a unit also sends, after the indicator.
    metric_units : int
        K_m: each of these is an integer of at most K_m in absolute value; 0 where there is none.
    """

    dimension: int
    noise_units: int
    clip_units: float
    sensitivity_units: int
    indicator_units: int = 0
    norm: Norm = Norm.L2
    rounding: Rounding = Rounding.NEAREST
    num_metrics: int = 0
    metric_units: int = 0

    def __post_init__(self) -> None:
        checks.positive_int(dimension=self.dimension, sensitivity_units=self.sensitivity_units)
        checks.non_negative_int(noise_units=self.noise_units, indicator_units=self.indicator_units)
        checks.non_negative_int(num_metrics=self.num_metrics, metric_units=self.metric_units)
        checks.positive(clip_units=self.clip_units)
        checks.at_most(LARGEST_SENSITIVITY_UNITS, sensitivity_units=self.sensitivity_units)
        checks.at_most(LARGEST_SENSITIVITY_UNITS, indicator_units=self.indicator_units)
        checks.at_most(self.sensitivity_units, clip_units=self.clip_units)
        object.__setattr__(self, "norm", Norm(self.norm))
        object.__setattr__(self, "rounding", checks.choice(Rounding, rounding=self.rounding))
        if self.indicator_units and self.norm is not Norm.L2:
            raise ValueError(f"indicator_units={self.indicator_units} must be 0 for norm=l1")
        if self.num_metrics or self.metric_units:
            self._check_metrics()

    def _check_metrics(self) -> None:
        checks.positive_int(num_metrics=self.num_metrics, metric_units=self.metric_units)
        if self.norm is not Norm.L2:
            raise ValueError(f"num_metrics={self.num_metrics} must be 0 for norm=l1")
        if self._squared_bound > _LARGEST_SQUARED_BOUND:
            raise ValueError(
                f"metric_units={self.metric_units} with num_metrics={self.num_metrics} must keep "
                "the squared bound of the whole vector within 2^53"
            )

    @property
    def _squared_bound(self) -> int:
        """Of all that a unit sends."""
        metrics = self.num_metrics * self.metric_units**2
        return self.sensitivity_units**2 + self.indicator_units**2 + metrics

    @property
    def width(self) -> int:
        """Length of what a unit sends: the update, the indicator if there is one, the metrics."""
        return self.dimension + (1 if self.indicator_units else 0) + self.num_metrics

    @property
    def largest_entry(self) -> int:
        """No entry of what a unit sends is larger in absolute value."""
        return max(self.sensitivity_units, self.indicator_units, self.metric_units)

    @property
    def noise_multiplier(self) -> float:
        """What the accounting charges: noise over the enforced bound of all that a unit sends."""
        # Integers up to 2^53 and a correctly rounded root: never below what was asked for.
        return self.noise_units / math.sqrt(self._squared_bound)

    @property
    def indicator_noise(self) -> float:
        """The s_b that really holds: noise on the sum of the indicators ``b_k - 1/2``."""
        if not self.indicator_units:
            raise ValueError("indicator_units=0: this grid carries no indicator")
        return self.noise_units / (2 * self.indicator_units)

    @property
    def metric_noise(self) -> float:
        """Standard deviation of the noise on the sum of one metric's places in [-1, 1]."""
        if not self.num_metrics:
            raise ValueError("num_metrics=0: this grid carries no metrics")
        return self.noise_units / self.metric_units

    def unit_size(self, clip_norm: float) -> float:
        """Return the real size of one grid unit when this is the clip norm."""
        checks.positive(clip_norm=clip_norm)
        return clip_norm / self.clip_units

    def fraction_within(self, noisy_indicator: int, expected_cohort: float) -> float:
        """Return the noisy fraction of units within the clip norm, from the noisy last entry."""
        checks.positive(expected_cohort=expected_cohort)
        if not self.indicator_units:
            raise ValueError("indicator_units=0: this grid carries no indicator")
        return int(noisy_indicator) / (2 * self.indicator_units * expected_cohort) + 0.5

    def mean_places(
        self, noisy_total: NDArray[np.int64], expected_cohort: float
    ) -> NDArray[np.float64]:
        """Return each metric's noisy mean place in its range, from the last entries of a sum.

        Parameters
        ----------
        noisy_total : int64 array, shape (width,)
            Noise included.
        expected_cohort : float
            The public normaliser: a unit that is missing counts as 0, the middle of the range.

        Returns
        -------
        float64 array, shape (num_metrics,)
            Within [-1, 1] but for the noise, of standard deviation ``metric_noise`` over the
            cohort.
        """
        checks.positive(expected_cohort=expected_cohort)
        entries = noisy_total[self.width - self.num_metrics :].astype(np.float64)
        return np.asarray(entries / (max(1, self.metric_units) * expected_cohort), np.float64)

    @classmethod
    def for_noise_multiplier(
        cls,
        noise_multiplier: float,
        dimension: int,
        *,
        norm: Norm = Norm.L2,
        rounding: Rounding = Rounding.NEAREST,
        indicator_noise: float | None = None,
        num_metrics: int = 0,
        metric_share: float = 0.01,
        max_inflation: float = 1.01,
        least_noise_units: int = USUAL_NOISE_UNITS,
    ) -> "IntegerGrid":
        """Return the coarsest grid that keeps ``S_int / S`` within ``max_inflation``.

        Parameters
        ----------
        noise_multiplier : float
            Noise over sensitivity that the whole release must have at least; for L1 the scale of
            Laplace noise over sensitivity. 0: no noise.
        dimension : int
            Length of one unit's vector.
        norm : Norm
        rounding : Rounding
        indicator_noise : float or None
            s_b, when units also send an indicator; what holds is :attr:`indicator_noise`, at least
            this much but where it exceeds s / 2, which K = 1 gives.
        num_metrics : int
            m: how many bounded metrics units also send.
        metric_share : float
            By what fraction these make the noise on the update larger, in clip norms:
            ``sqrt(S_int^2 + m K_m^2) <= (1 + metric_share) S_int``, as near as K_m, rounded down
            to an integer of at least 1, comes to it.
        max_inflation : float
            How much longer than the clip norm the enforced bound may be.
        least_noise_units : int
            The coarsest s there may be, a power of two.

        Raises
        ------
        ValueError
            Naming the argument; when no grid is fine enough, naming the ways out.
        """
        checks.non_negative(noise_multiplier=noise_multiplier)
        checks.positive_int(dimension=dimension)
        norm = checks.choice(Norm, norm=norm)
        rounding = checks.choice(Rounding, rounding=rounding)
        if not (math.isfinite(max_inflation) and max_inflation > 1):
            raise ValueError(f"max_inflation={max_inflation!r} must be a finite number > 1")
        if indicator_noise is not None:
            checks.positive(indicator_noise=indicator_noise)
            if noise_multiplier >= 2 * indicator_noise:
                raise ValueError(
                    f"noise_multiplier={noise_multiplier!r} must be < 2 * indicator_noise "
                    f"= {2 * indicator_noise!r}"
                )
        checks.non_negative_int(num_metrics=num_metrics)
        checks.positive(metric_share=metric_share)
        if noise_multiplier == 0:
            clip_units = _CLIP_UNITS_WITHOUT_NOISE
            bound = math.ceil(_rounded_norm(clip_units, dimension, norm, rounding))
            return cls(
                dimension,
                0,
                clip_units,
                bound,
                int(indicator_noise is not None),
                norm,
                rounding,
                num_metrics,
                _METRIC_UNITS_WITHOUT_NOISE if num_metrics else 0,
            )
        checks.positive_int(least_noise_units=least_noise_units)
        if least_noise_units & (least_noise_units - 1):
            raise ValueError(f"least_noise_units={least_noise_units!r} must be a power of two")
        noise_units = int(least_noise_units)
        while noise_units <= _LARGEST_NOISE_UNITS:
            indicator = 0
            if indicator_noise is not None:
                indicator = max(1, math.floor(noise_units / (2 * indicator_noise)))
            squared = _squared_units(noise_units, noise_multiplier, indicator)
            metrics = _metric_units(squared, num_metrics, metric_share) if num_metrics else 0
            bound = math.isqrt(max(0, squared - num_metrics * metrics**2))
            if math.isqrt(squared) > LARGEST_SENSITIVITY_UNITS:
                raise ValueError(
                    f"noise_multiplier={noise_multiplier!r} must be 0 or at least "
                    f"{noise_units / LARGEST_SENSITIVITY_UNITS!r}"
                )
            clip_units = _clip_units(bound, dimension, norm, rounding)
            if clip_units > 0 and bound / clip_units <= max_inflation:
                return cls(
                    dimension,
                    noise_units,
                    clip_units,
                    bound,
                    indicator,
                    norm,
                    rounding,
                    num_metrics,
                    metrics,
                )
            noise_units *= 2
        raise ValueError(
            f"noise_multiplier={noise_multiplier!r} with dimension={dimension} and "
            f"max_inflation={max_inflation!r} needs a finer grid than {_LARGEST_NOISE_UNITS} units "
            "of noise: raise max_inflation (and with it the error), lower the noise multiplier, "
            "release fewer parameters, or round to nearest"
        )


def to_float(
    noisy_total: NDArray[np.int64], unit_size: float, expected_cohort: float
) -> NDArray[np.float64]:
    """Turn a noisy integer sum into the float64 mean: the one conversion, and the last step.

    Parameters
    ----------
    noisy_total : int64 array
        Noise included; nothing that is not noised may come here.
    unit_size : float
        :meth:`IntegerGrid.unit_size` of the round.
    expected_cohort : float
        The public normaliser.
    """
    checks.positive(unit_size=unit_size, expected_cohort=expected_cohort)
    return np.asarray(noisy_total, np.float64) * (unit_size / expected_cohort)


def _squared_units(noise_units: int, noise_multiplier: float, indicator: int) -> int:
    """Return the most that S_int^2 + m K_m^2 may be beside an indicator of K units.

    ``s / sqrt(S_int^2 + K^2 + m K_m^2) >= noise_multiplier`` holds up to there, without rounding.
    """
    total = math.floor(Fraction(noise_units) / Fraction(noise_multiplier))
    return max(0, total**2 - indicator**2)


def _metric_units(squared: int, num_metrics: int, share: float) -> int:
    """Return the K_m with which ``S_int^2 = squared - m K_m^2 = squared / (1 + share)^2``."""
    part = (1 - (1 + Fraction(share)) ** -2) / num_metrics
    return max(1, math.isqrt(math.floor(squared * part)))


def _rounding_terms(dimension: int, norm: Norm, rounding: Rounding) -> tuple[float, float, float]:
    """Return (linear, constant, certain): how rounding lengthens a vector of S units.

    L2: at most ``S + certain``, and but for a probability of about 1e-12 at most
    ``sqrt(S^2 + linear S + constant)``: the squared errors have mean d/12 (at most d/4 when
    dithered), and by Hoeffding's inequality their sum and their product with the vector stay near
    their means; as the bound of Kairouz, Liu, Steinke, arXiv 2102.06387, section 4.2, on
    conditional rounding. Entries that share a dither number err together, at most sqrt(m) times
    as far, m of them sharing one. L1: ``S + constant`` and ``S + certain``.
    """
    root = math.sqrt(dimension)
    dithered = rounding is Rounding.DITHERED
    spread = _SPREAD * math.sqrt(math.ceil(dimension / PERIOD) if dithered else 1)
    if norm is Norm.L1:
        return 0.0, spread * root / 2, dimension if dithered else dimension / 2
    if dithered:
        return spread, dimension / 4 + spread * root / 2, root
    return spread, dimension / 12 + spread * root / 8, root / 2


def _rounded_norm(clip_units: float, dimension: int, norm: Norm, rounding: Rounding) -> float:
    """Return a bound on the norm, once rounded, of an honest unit of ``clip_units``."""
    linear, constant, certain = _rounding_terms(dimension, norm, rounding)
    if norm is Norm.L1:
        return clip_units + min(constant, certain)
    likely = math.sqrt(clip_units**2 + linear * clip_units + constant)
    return min(likely, clip_units + certain)


def _clip_units(bound: int, dimension: int, norm: Norm, rounding: Rounding) -> float:
    """Return the largest S whose rounded norm is within ``bound``: the inverse of the above."""
    linear, constant, certain = _rounding_terms(dimension, norm, rounding)
    if norm is Norm.L1:
        clip_units = bound - min(constant, certain)
    else:
        rest = linear**2 / 4 + bound**2 - constant
        likely = math.sqrt(rest) - linear / 2 if rest > 0 else 0.0
        clip_units = max(likely, bound - certain)
    return clip_units * (1 - 2.0**-20)  # room for the float32 products
