"""From a budget to a plan: the noise of each share, and the scale that fits the modulus.

>>> plan = design(
...     noise_multiplier=2.0, rounds=1, dimension=1000, clip_norm=1.0, num_nodes=100,
...     min_survivors=80, max_units=100, bits=20, relation="zero-out", unit="node",
... )
>>> 2.0 <= plan.noise_multiplier < 2.001
True
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Composed,
    Event,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    calibrate_event,
)
from dpfl_flower.distributed.plan import DistributedPlan, ShareNoise
from dpfl_flower.noise.skellam import MAX_SQUARED_SCALE
from dpfl_flower.quantize import DistributedGrid
from dpfl_flower.quantize.grid import LARGEST_SENSITIVITY_UNITS

__all__ = ["design"]

_USUAL_SQUARED_SCALE: Final = 1 << 28
_FINE_ENOUGH: Final = 1.005
"""Below this inflation of the bound a finer grid only costs larger tables."""


def design(
    budget: PrivacyBudget | None = None,
    *,
    rounds: int,
    dimension: int,
    clip_norm: float,
    num_nodes: int,
    min_survivors: int,
    max_units: int,
    colluders: int = 0,
    noise: ShareNoise | str = ShareNoise.DISCRETE_GAUSSIAN,
    bits: int = 32,
    noise_multiplier: float | None = None,
    unit: PrivacyUnit | str | None = None,
    relation: Relation | str | None = None,
    headroom: float = 6.0,
    max_inflation: float = 1.1,
    prior: Sequence[Event] = (),
) -> DistributedPlan:
    """Return a plan under which ``rounds`` rounds stay within ``budget``.

    Parameters
    ----------
    budget : PrivacyBudget or None
        What ``rounds`` rounds stay within, without any amplification by sampling: the server knows
        the cohort.
    rounds : int
    dimension : int
        Length of an update.
    clip_norm : float
        C.
    num_nodes : int
        The most nodes in a sum.
    min_survivors : int
        t, the fewest; shares are calibrated to ``min_survivors - colluders`` of them.
    max_units : int
        A public bound on how many units a sum is made of; for ``unit="node"`` the nodes. It only
        decides how much room the modulus leaves: privacy does not depend on it.
    colluders : int
        c, how many survivors may work with the server. 0: none, which is an assumption.
    noise : ShareNoise
    bits : int
        Sums travel modulo 2^bits.
    noise_multiplier : float or None
        The certain noise over the bound on one unit, instead of a budget.
    unit, relation
        Only without a budget, which names its own.
    headroom : float
        How many standard deviations of a coordinate fit half the modulus, for the worst case of
        updates that all agree.
    max_inflation : float
        How much longer than the clip norm the enforced bound may be.
    prior : sequence of Event
        What was released about the same data before.

    Raises
    ------
    ValueError
        Naming the argument; when the modulus is too small for the noise, naming the ways out.
    """
    if (budget is None) == (noise_multiplier is None):
        raise ValueError(
            f"budget={budget!r} and noise_multiplier={noise_multiplier!r}: exactly one of the two "
            "must be given"
        )
    if budget is not None:
        for name, value, own in (
            ("unit", unit, budget.unit),
            ("relation", relation, budget.relation),
        ):
            if value is not None and value != own:
                raise ValueError(f"{name}={value!r} must be the budget's own, {own!r}")
        unit, relation = budget.unit, budget.relation
    checks.positive_int(rounds=rounds, max_units=max_units)
    checks.positive(headroom=headroom, max_inflation=max_inflation)

    def planned(multiplier: float) -> DistributedPlan:
        return _planned(
            multiplier,
            DistributedPlan(
                grid=DistributedGrid(
                    dimension=dimension, clip_units=1.0, sensitivity_units=1, bits=bits
                ),
                noise=ShareNoise(noise),
                squared_scale=1,
                clip_norm=clip_norm,
                num_nodes=num_nodes,
                min_survivors=min_survivors,
                colluders=colluders,
                unit=PrivacyUnit(unit or PrivacyUnit.NODE),
                relation=Relation(relation or Relation.ADD_OR_REMOVE_ONE),
            ),
            max_units=max_units,
            headroom=headroom,
        )

    if noise_multiplier is None:
        assert budget is not None
        noise_multiplier = calibrate_event(
            lambda z: Composed(planned(z).event, rounds),
            budget,
            prior=prior,
            total_variation=rounds * _most_variation(planned(1.0)),
        )
    checks.positive(noise_multiplier=noise_multiplier)
    plan = planned(noise_multiplier)
    inflation = plan.grid.sensitivity_units / plan.grid.clip_units
    if plan.noise_multiplier < noise_multiplier or inflation > max_inflation:
        raise ValueError(
            f"bits={bits!r} leave too coarse a grid for {plan.grid.padded} coordinates, "
            f"{num_nodes} nodes and noise_multiplier={noise_multiplier:g}: the enforced bound is "
            f"{inflation:.3g} times the clip norm, max_inflation={max_inflation!r}. Allow more "
            "bits, lower headroom or max_units, release fewer parameters, or raise max_inflation"
        )
    return plan


def _planned(
    noise_multiplier: float, draft: DistributedPlan, *, max_units: int, headroom: float
) -> DistributedPlan:
    """Return the draft with the finest grid worth having that leaves the headroom.

    No finer than makes the bound `_FINE_ENOUGH` times the clip norm, or 2^14 units of noise.
    """
    scale = _USUAL_SQUARED_SCALE
    plan = _at_scale(noise_multiplier, scale, draft)
    while scale < MAX_SQUARED_SCALE and _inflation(plan) > _FINE_ENOUGH:
        scale *= 4
        plan = _at_scale(noise_multiplier, scale, draft)
    if _fits(plan, max_units=max_units, headroom=headroom):
        return plan
    low, high = 1, scale
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(
            _at_scale(noise_multiplier, middle, draft), max_units=max_units, headroom=headroom
        ):
            low = middle
        else:
            high = middle
    return _at_scale(noise_multiplier, low, draft)


def _at_scale(
    noise_multiplier: float, squared_scale: int, draft: DistributedPlan
) -> DistributedPlan:
    """Return the draft with shares of about this squared scale, and never less noise than asked.

    The bound on a unit is the largest integer that the multiplier allows, the share then the
    narrowest that it needs: ``(t - c) v >= (z S_int)^2``.
    """
    certain = draft.honest_shares * squared_scale
    bound = math.floor(math.sqrt(certain) / noise_multiplier)
    bound = max(1, min(bound, LARGEST_SENSITIVITY_UNITS))
    needed = math.ceil((Fraction(noise_multiplier) * bound) ** 2 / draft.honest_shares)
    return dataclasses.replace(
        draft,
        grid=_grid(bound, draft.grid),
        squared_scale=min(MAX_SQUARED_SCALE, max(1, needed)),
    )


def _grid(bound: int, draft: DistributedGrid) -> DistributedGrid:
    try:
        return DistributedGrid.within(bound, dimension=draft.dimension, bits=draft.bits)
    except ValueError:
        # Rounding alone fills the bound: a grid so coarse that `design` refuses it.
        return DistributedGrid(
            dimension=draft.dimension, clip_units=1e-9, sensitivity_units=bound, bits=draft.bits
        )


def _inflation(plan: DistributedPlan) -> float:
    return plan.grid.sensitivity_units / plan.grid.clip_units


def _fits(plan: DistributedPlan, *, max_units: int, headroom: float) -> bool:
    """Return whether so many standard deviations of a coordinate are within half the modulus.

    ``k^2 (m^2 S^2 / d + m / 4 + n v) <= 4^(bits - 1)``: after the rotation the sum of m updates
    that all agree has variance ``m^2 S^2 / d`` in a coordinate, rounding adds at most 1/4 a unit,
    and each of n nodes a share. With one unit a node, solved for the scale, it is Kairouz, Liu,
    Steinke, arXiv 2102.06387, Section 5: ``s = sqrt(4^b - n k^2) / (2 k sqrt(c^2 n^2 / d +
    n sigma^2))``.
    """
    grid = plan.grid
    square = (max_units * grid.clip_units) ** 2 / grid.padded
    square += max_units / 4 + plan.num_nodes * plan.squared_scale
    return headroom**2 * square <= 4.0 ** (grid.bits - 1)


def _most_variation(plan: DistributedPlan) -> float:
    """Return the total variation of one round at the widest share, which no plan exceeds."""
    widest = dataclasses.replace(plan, squared_scale=MAX_SQUARED_SCALE)
    return widest.total_variation
