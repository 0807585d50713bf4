"""What distributing the noise costs in accuracy, against one trusted server that adds it.

>>> from dpfl_flower.accounting import PrivacyBudget
>>> from dpfl_flower.distributed.design import design
>>> budget = PrivacyBudget(1.0, 1e-4, "example")
>>> plan = design(budget, rounds=30, dimension=16, clip_norm=0.5, num_nodes=4, min_survivors=3,
...     max_units=736)
>>> result = accuracy(plan, budget, rounds=30, units=736)
>>> round(result.error_ratio, 2), round(result.from_accounting, 2), round(result.from_surplus, 2)
(1.27, 1.1, 1.15)
"""

import math
from dataclasses import dataclass

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyBudget, calibrate
from dpfl_flower.distributed.design import design
from dpfl_flower.distributed.plan import DistributedPlan, ShareNoise
from dpfl_flower.lazily import lazily

optimize = lazily("scipy.optimize")

__all__ = ["Accuracy", "accuracy", "accuracy_lost", "wrap_probability"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The error of a coordinate of the sum, against central noise for the same budget.

    Attributes
    ----------
    error_ratio : float
        Root mean square error over the standard deviation of central Gaussian noise: about the
        product of the factors below, and what wrapping adds.
    from_accounting : float
        The noise that the event needs over what an exactly accounted Gaussian needs.
    from_surplus : float
        What all survivors' shares are over the certain ones: sqrt(survivors / (t - c)).
    from_rounding : float
        What the enforced bound is over the clip norm, and what rounding adds to the noise.
    wrap_probability : float
        A bound on the probability that a given coordinate wraps around, in one round.
    """

    error_ratio: float
    from_accounting: float
    from_surplus: float
    from_rounding: float
    wrap_probability: float


def accuracy(
    plan: DistributedPlan,
    budget: PrivacyBudget,
    *,
    rounds: int,
    units: int,
    survivors: int | None = None,
) -> Accuracy:
    """Return the error of one coordinate of a round's sum, and where it comes from.

    Parameters
    ----------
    plan : DistributedPlan
    budget : PrivacyBudget
        What central noise is calibrated to: Gaussian, everyone in every round.
    rounds : int
    units : int
        How many units a sum is made of, each rounded by itself.
    survivors : int or None
        How many nodes stay in the round; None: all.
    """
    checks.positive_int(rounds=rounds, units=units)
    survivors = plan.num_nodes if survivors is None else survivors
    checks.positive_int(survivors=survivors)
    grid = plan.grid
    central = calibrate(budget, None, rounds)
    wraps = wrap_probability(plan, units=units, survivors=survivors)
    noise = survivors * plan.share.variance
    rounding = units / 4  # each rounding error has variance f (1 - f) <= 1/4
    # A coordinate that wraps is wrong by 2^bits; the rotation back spreads that over all.
    square = noise + rounding + wraps * 4.0**grid.bits
    return Accuracy(
        error_ratio=math.sqrt(square) / (central * grid.clip_units),
        from_accounting=plan.noise_multiplier / central,
        from_surplus=math.sqrt(survivors / plan.honest_shares),
        from_rounding=grid.sensitivity_units / grid.clip_units * math.sqrt(1 + rounding / noise),
        wrap_probability=wraps,
    )


def accuracy_lost(
    budget: PrivacyBudget,
    *,
    rounds: int,
    num_nodes: int,
    dimension: int,
    clip_norm: float,
    bits: int,
    min_survivors: int | None = None,
    colluders: int = 0,
    units: int | None = None,
    noise: ShareNoise | str = ShareNoise.DISCRETE_GAUSSIAN,
    max_inflation: float = 1.1,
) -> Accuracy:
    """Return what the noise of n nodes costs at so many bits, before there is a plan.

    Parameters
    ----------
    budget, rounds, num_nodes, dimension, clip_norm, bits, colluders, noise, max_inflation
        As for `design`.
    min_survivors : int or None
        t, the fewest nodes in a sum; None: all.
    units : int or None
        How many units a sum is made of; None: one in each node.

    Raises
    ------
    ValueError
        As for `design`: a modulus that is too small is one that costs too much.

    Examples
    --------
    >>> budget = PrivacyBudget(8.0, 1e-5, "node", relation="zero-out")
    >>> for bits in (13, 16):
    ...     lost = accuracy_lost(
    ...         budget, rounds=10, num_nodes=100, dimension=1 << 16, clip_norm=1.0, bits=bits,
    ...         max_inflation=1.2,
    ...     )
    ...     print(bits, round(lost.error_ratio, 2))
    13 1.15
    16 1.06
    """
    units = num_nodes if units is None else units
    plan = design(
        budget,
        rounds=rounds,
        dimension=dimension,
        clip_norm=clip_norm,
        num_nodes=num_nodes,
        min_survivors=num_nodes if min_survivors is None else min_survivors,
        max_units=units,
        colluders=colluders,
        noise=noise,
        bits=bits,
        max_inflation=max_inflation,
    )
    return accuracy(plan, budget, rounds=rounds, units=units)


def wrap_probability(plan: DistributedPlan, *, units: int, survivors: int | None = None) -> float:
    """Return a bound on the probability that one coordinate of the noisy sum leaves the modulus.

    For any updates, fixed before the round's signs were drawn. By Chernoff's bound: random signs
    make a coordinate of the rotated sum, of norm at most ``units`` clip norms, subgaussian with
    variance ``units^2 S^2 / d`` (Hoeffding, JASA 1963, Theorem 2); rounding moves it by at most
    ``units``; the shares' moments are known (discrete Gaussians are subgaussian: arXiv 2004.00010,
    Lemma 22; ``log E exp(t X) = mu (cosh t - 1)`` for Skellam).
    """
    checks.positive_int(units=units)
    grid = plan.grid
    shares = (plan.num_nodes if survivors is None else survivors) * plan.squared_scale
    room = 2.0 ** (grid.bits - 1) - units
    if room <= 0:
        return 1.0
    sums = (units * grid.clip_units) ** 2 / grid.padded

    def log_bound(t: float) -> float:
        if plan.noise is ShareNoise.SKELLAM:
            noise = shares * 2 * math.sinh(t / 2) ** 2  # cosh t - 1
        else:
            noise = shares * t * t / 2
        return sums * t * t / 2 + noise - t * room

    # Every t > 0 gives a bound; about the best one is the Gaussian's.
    gaussian = room / (sums + shares)
    best = optimize.minimize_scalar(
        log_bound, bounds=(0.0, min(2 * gaussian, 100.0)), method="bounded"
    )
    return min(1.0, 2 * math.exp(min(0.0, float(best.fun))))
