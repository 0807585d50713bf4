"""Client metrics that are as private as the model: bounded, summed with the update, noised with it.

>>> NoisedMetrics({"accuracy": (0, 1), "loss": (0, 5)})
NoisedMetrics(bounds={'accuracy': (0.0, 1.0), 'loss': (0.0, 5.0)}, share=0.01)
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import final

from dpfl_flower import checks
from dpfl_flower.metric_ranges import MetricRanges

__all__ = ["NoisedMetrics"]


@final
@dataclass(frozen=True)
class NoisedMetrics:
    """Releases the mean of each of these metrics in every round, with noise that epsilon covers.

    Each node's metrics of its training reply are clipped to their ranges, rounded and appended to
    its bounded update. The noise covers the whole vector, so that a round with metrics is one
    release at the price of one, by the argument that pays for the clip indicator (Andrew et al.,
    arXiv 1905.03871, Theorem 1). What comes out is the mean metric, in the training metrics of the
    result under its own name, clipped to its range (which costs nothing: it is public).

    A node counts once, whatever its weight. One that is missing, whose update is not finite or
    that does not report the metric as a finite number counts as the middle of the range, since
    the sum is divided by the expected cohort and not by who answered: dropouts pull the mean there.

    Attributes
    ----------
    bounds : mapping of str to (float, float)
        The range (low, high) of each metric by its name in the reply: a public constant, never
        taken from data. The narrower, the less noise.
    share : float
        In (0, 1]: by what fraction the metrics make the noise on the model larger, for the same
        budget. They lengthen the vector whose norm the noise is sized for: of m metrics each has
        K units with ``sqrt(S^2 + m K^2) = (1 + share) S``, S the update's. The noise on a mean
        metric then has the standard deviation, but for K being an integer, ::

            z (high - low) / (2 expected_cohort) * sqrt(m / (1 - (1 + share)**-2))

        with z the noise multiplier; adaptive clipping, whose indicator takes a part, makes that
        ``1 / sqrt(z**-2 - (2 indicator_noise)**-2)``. It is 0.05 of the range for two metrics, a
        share of 0.01, z = 1 and 100 nodes, and is in the result's ``metric_noise``.

    Notes
    -----
    Under Poisson sampling at rate q the cohort's size varies while the divisor does not. That adds
    to the error of a mean, as an estimate of the population's, a standard deviation of ::

        (high - low) / 2 * sqrt((1 - q) / expected_cohort * mean(place**2))

    with each unit's place in [-1, 1]: none where all lie in the middle of the range, the most where
    they lie at its ends. It is no noise that epsilon counts on, depends on data, and is not in
    ``metric_noise``. The nearer the middle of the range is to what is expected, the smaller it is.

    Raises
    ------
    ValueError
        Without a metric, for a range that is none, and for a share out of range.

    Examples
    --------
    >>> from dpfl_flower import EveryoneSampling, FixedClipping
    >>> from dpfl_strategies import DPFedAvg, NoisedMetrics
    >>> strategy = DPFedAvg(
    ...     noise_multiplier=1.0,
    ...     sampling=EveryoneSampling(100),
    ...     clipping=FixedClipping(0.5),
    ...     metrics=NoisedMetrics({"accuracy": (0.0, 1.0), "loss": (0.0, 5.0)}),
    ... )
    """

    bounds: Mapping[str, tuple[float, float]]
    _: KW_ONLY
    share: float = 0.01

    def __post_init__(self) -> None:
        checks.fraction(share=self.share)
        ranges = MetricRanges.of(self.bounds)
        if not ranges:
            raise ValueError(f"bounds={self.bounds!r} must name a metric")
        pairs = zip(ranges.lows, ranges.highs, strict=True)
        object.__setattr__(self, "bounds", dict(zip(ranges.names, pairs, strict=True)))

    @cached_property
    def ranges(self) -> MetricRanges:
        """Names and ranges as a vector holds them."""
        return MetricRanges.of(self.bounds)
