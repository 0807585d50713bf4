"""Rényi accounting: for fixed-size samples, distributed noise, and a delta too small for FFTs.

dp-accounting 0.6 forgets that a sum moves by twice the clip norm when a unit is *replaced* (for
Gaussian, fixed-size sampled and Laplace events alike), so noise multipliers are halved here before
they are handed over under replace-one. Privacy loss distributions must not be given halved ones.

>>> counts = {FixedSizeSampled(1000, 50, Gaussian(1.0)): 200}
>>> round(compose(counts, Relation.REPLACE_ONE).epsilon(1e-5), 1)
58.4
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import distributed
from dpfl_flower.accounting.events import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
)
from dpfl_flower.accounting.units import Relation
from dpfl_flower.lazily import lazily

dp_accounting = lazily("dp_accounting")
rdp = lazily("dp_accounting.rdp")
rdp_privacy_accountant = lazily("dp_accounting.rdp.rdp_privacy_accountant")

_ROUNDING = 1e-13


def supports(event: Event, relation: Relation) -> bool:
    """Return whether ``event`` has a valid Rényi curve under ``relation``."""
    match event:
        case Gaussian() | Laplace() | DistributedDiscreteGaussian() | DistributedSkellam():
            return True
        case PoissonSampled(event=Gaussian()):
            return relation is not Relation.REPLACE_ONE
        case FixedSizeSampled():
            return relation is Relation.REPLACE_ONE
        case _:
            return False


def needed(event: Event) -> bool:
    """Return whether nothing but a Rényi curve prices ``event``."""
    return isinstance(event, FixedSizeSampled | DistributedDiscreteGaussian | DistributedSkellam)


def _translate(event: Event, sensitivity: int) -> Any:
    match event:
        case Gaussian(noise_multiplier=z):
            return dp_accounting.GaussianDpEvent(z / sensitivity)
        case Laplace(noise_multiplier=b):
            return dp_accounting.LaplaceDpEvent(b / sensitivity)
        case PoissonSampled(rate=rate, event=inner):
            return dp_accounting.PoissonSampledDpEvent(rate, _translate(inner, sensitivity))
        case FixedSizeSampled(population=population, cohort=cohort, event=inner):
            return dp_accounting.SampledWithoutReplacementDpEvent(
                population, cohort, _translate(inner, sensitivity)
            )
        case _:
            raise TypeError(f"{event!r} has no Rényi curve")


@dataclass(frozen=True)
class Curve:
    """Rényi divergences of a composition at some orders."""

    orders: NDArray[np.float64]
    divergences: NDArray[np.float64]

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon over the orders (arXiv 2004.00010, Proposition 12)."""
        found, _ = rdp_privacy_accountant.compute_epsilon(self.orders, self.divergences, delta)
        return float(found)

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta over the orders."""
        found, _ = rdp_privacy_accountant.compute_delta(self.orders, self.divergences, epsilon)
        return float(found)


def compose(counts: Mapping[Event, int], relation: Relation) -> Curve:
    """Return the curve of all the releases in ``counts`` together: divergences add up."""
    divergences = sum(count * _divergences(event, relation) for event, count in counts.items())
    orders = np.asarray(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)
    # Rounding makes tiny divergences zero or negative, which dp-accounting reads as "no privacy
    # lost". The logarithms that are divided by (order - 1) >= 0.1 are good to about 1e-14.
    rounding = _ROUNDING * sum(counts.values())
    return Curve(orders, np.maximum(divergences, 0.0) + rounding)


@lru_cache(maxsize=64)
def _divergences(event: Event, relation: Relation) -> NDArray[np.float64]:
    """Return the divergences of one release at dp-accounting's default orders."""
    replace = relation is Relation.REPLACE_ONE
    moved = 2 if replace else 1
    orders = rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    match event:
        case DistributedDiscreteGaussian():
            return np.array([_of_discrete_gaussian(event, order, moved) for order in orders])
        case DistributedSkellam():
            return np.array([_of_skellam(event, order, moved) for order in orders])
    neighbours = dp_accounting.NeighboringRelation
    accountant = rdp.RdpAccountant(
        neighboring_relation=neighbours.REPLACE_ONE if replace else neighbours.ADD_OR_REMOVE_ONE
    )
    with np.errstate(all="ignore"):  # orders that overflow are infinite, and not the best ones
        accountant.compose(_translate(event, moved))
    return np.asarray(accountant.rdp, dtype=np.float64)


def _of_discrete_gaussian(event: DistributedDiscreteGaussian, order: float, moved: int) -> float:
    return distributed.discrete_gaussian_rdp(
        order,
        event.squared_scale,
        shares=event.shares,
        l2=moved * event.l2_sensitivity,
        l1=moved * event.l1_sensitivity,
        dimension=event.dimension,
    )


def _of_skellam(event: DistributedSkellam, order: float, moved: int) -> float:
    return distributed.skellam_rdp(
        order,
        float(event.shares * event.squared_scale),
        l2=moved * event.l2_sensitivity,
        l1=moved * event.l1_sensitivity,
    )
