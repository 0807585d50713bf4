"""What a mechanism that releases noisy sums of plain data must obey; subclass `ReleaseContract`.

Like `mechanism`, but black-box: the noise is replaced by zeros, or by a one everywhere, and the
released numbers are compared in grid units with what one release is accounted for.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfl_flower.accounting import Gaussian, Laplace
from dpfl_flower.mechanisms import Mechanism
from dpfl_flower.noise import NoiseDistribution
from tests.support.contracts import statistics
from tests.support.contracts.hostile import UNIT_KINDS, unit_arrays
from tests.support.contracts.seeds import reseed

CLAIMS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)
DIMENSION = 11
WIDE = 400
units = st.tuples(st.sampled_from(UNIT_KINDS), st.integers(0, 2**31).map(lambda n: 2 * n + 1))


class ReleaseContract(ABC):
    """Subclass it, name the mechanism and its noise, and inherit the claims."""

    clip_norm = 0.7
    noise: type[NoiseDistribution]

    @abstractmethod
    def mechanism(self, relation: str) -> Mechanism:
        """Return the mechanism with the clip norm of the class."""

    @abstractmethod
    def cdf(self, x: NDArray) -> NDArray:
        """Return the CDF of the noise at scale 1."""

    @CLAIMS
    @given(others=st.lists(units, max_size=3), unit=units)
    def test_one_unit_moves_what_is_released_by_at_most_the_bound(self, others, unit):
        self._require_within([*others, unit], others, neighbours=1)

    @CLAIMS
    @given(others=st.lists(units, max_size=3), unit=units, other=units)
    def test_replacing_a_unit_moves_it_by_at_most_twice_the_bound(self, others, unit, other):
        self._require_within([*others, unit], [*others, other], neighbours=2)

    @pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
    def test_the_noise_has_the_scale_that_is_accounted_for_and_3_percent_off_is_rejected(
        self, relation
    ):
        mechanism = self.mechanism(relation)
        # What a grid unit and the noise's scale in it are is read off; they must make up what is
        # accounted for, and S_int / S may add 1 %.
        with self._noise_replaced(1) as seen:
            unit = mechanism.release([], dimension=WIDE)[0]
        scale = seen["scale"]
        stated = _multiplier(mechanism) * self.clip_norm
        assert stated * (1 - 1e-9) <= scale * unit <= stated * 1.01
        draws = []
        for _ in range(400):
            reseed()
            draws.append(mechanism.release([], dimension=WIDE) / unit)
        noise = np.concatenate(draws)
        integers = noise.round().astype(np.int64)
        np.testing.assert_allclose(noise, integers, atol=1e-3)
        # The real noise must have exactly that scale: 160,000 draws of a Laplace put 3 % 12
        # standard errors away, so that it is missed once in 1e9.
        assert statistics.cells_fit(integers, lambda x: self.cdf(x / scale))
        statistics.require_scale_of_law(integers, lambda off, x: self.cdf(x / (off * scale)))
        statistics.require_uncorrelated([np.concatenate(draws[i::3][:133]) for i in range(3)])

    # --- inside -------------------------------------------------------------------------------

    @contextmanager
    def _noise_replaced(self, value: int) -> Iterator[dict[str, float]]:
        seen: dict[str, float] = {}

        def sample(distribution, n, rng):
            del rng
            seen["scale"] = distribution.scale
            return np.full(n, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.noise, "sample", sample)
            yield seen

    def _require_within(self, cohort, neighbour, *, neighbours: int) -> None:
        mechanism = self.mechanism("add-or-remove-one")
        with self._noise_replaced(0) as seen:
            a, b = (
                mechanism.release(self._data(c), dimension=DIMENSION) for c in (cohort, neighbour)
            )
        with self._noise_replaced(1):
            unit = mechanism.release([], dimension=DIMENSION)
        moved = ((a - b) / unit).round()
        np.testing.assert_allclose((a - b) / unit, moved, atol=1e-3)
        integers = [int(q) for q in moved]
        z, scale = Fraction(_multiplier(mechanism)), Fraction(seen["scale"])
        if isinstance(mechanism.event, Gaussian):
            assert sum(q * q for q in integers) * z**2 <= (neighbours * scale) ** 2
        else:
            assert sum(map(abs, integers)) * z <= neighbours * scale

    def _data(self, cohort) -> list[NDArray]:
        return [
            np.concatenate(
                [
                    np.ravel(part)
                    for part in unit_arrays(kind, seed, "float64", DIMENSION, self.clip_norm)[0]
                ]
            )
            for kind, seed in cohort
        ]


def _multiplier(mechanism: Mechanism) -> float:
    """Return the noise, in clip norms, of the event that a release is."""
    event = mechanism.event
    assert isinstance(event, Gaussian | Laplace)
    assert math.isfinite(event.noise_multiplier)
    return event.noise_multiplier
