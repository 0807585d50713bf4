"""Rényi accounting: for fixed-size samples, and for a delta too small for FFTs.

dp-accounting 0.6 forgets that a sum moves by twice the clip norm when a unit is *replaced* (for
Gaussian, fixed-size sampled and Laplace events alike), so noise multipliers are halved here before
they are handed over under replace-one. Privacy loss distributions must not be given halved ones.

>>> counts = {FixedSizeSampled(1000, 50, Gaussian(1.0)): 200}
>>> round(float(compose(counts, Relation.REPLACE_ONE).get_epsilon(1e-5)), 1)
58.4
"""

from collections.abc import Mapping
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import rdp

from dpfl_flower.accounting.events import (
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
)
from dpfl_flower.accounting.units import Relation


def supports(event: Event, relation: Relation) -> bool:
    """Return whether ``event`` has a valid Rényi curve under ``relation``."""
    match event:
        case Gaussian() | Laplace():
            return True
        case PoissonSampled(event=Gaussian()):
            return relation is not Relation.REPLACE_ONE
        case FixedSizeSampled():
            return relation is Relation.REPLACE_ONE
        case _:
            return False


def _translate(event: Event, sensitivity: int) -> dp_accounting.DpEvent:
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


def compose(counts: Mapping[Event, int], relation: Relation) -> Any:
    """Return dp-accounting's Rényi accountant with all the releases in ``counts`` composed."""
    replace = relation is Relation.REPLACE_ONE
    neighbours = dp_accounting.NeighboringRelation
    accountant = rdp.RdpAccountant(
        neighboring_relation=neighbours.REPLACE_ONE if replace else neighbours.ADD_OR_REMOVE_ONE
    )
    with np.errstate(all="ignore"):  # orders that overflow are infinite, and not the best ones
        for event, count in counts.items():
            accountant.compose(_translate(event, 2 if replace else 1), count)
    return accountant
