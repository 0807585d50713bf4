"""What shuffling adds to local noise: a figure to report beside epsilon, never instead of it.

It holds only where something that does not work with the server mixes the reports of a round, all
of them from independent nodes with the same local noise, before anyone sees them. Flower shows the
sender of every message: over Flower alone there is no such thing, and secure aggregation gives a
sum, which distributed noise protects better.

>>> round(shuffled_epsilon(1.0, reports=100_000, delta=1e-6), 3)
0.073
>>> shuffled_epsilon(8.0, reports=100, delta=1e-6)  # too few to hide among: the local epsilon
8.0
"""

import math

from dpfl_flower.checks import positive, positive_int, probability

__all__ = ["shuffled_epsilon"]


def shuffled_epsilon(local_epsilon: float, *, reports: int, delta: float, rounds: int = 1) -> float:
    """Return the epsilon of ``rounds`` shuffled rounds, at ``delta`` for all of them.

    Feldman, McMillan, Talwar, arXiv 2012.12803, Theorem 3.1: with ``n`` reports, each epsilon_0-DP
    by itself (replace-one, *pure*: Laplace noise, not Gaussian) and
    ``epsilon_0 <= log(n / (16 log(2 / delta)))``, the shuffled reports are (epsilon, delta)-DP with

        epsilon = log(1 + (e^e0 - 1) / (e^e0 + 1) (8 sqrt(e^e0 log(4 / delta) / n) + 8 e^e0 / n))

    Elsewhere, and where that is larger, the local epsilon itself. Rounds compose in the plainest
    way, with an equal part of delta each.

    Parameters
    ----------
    local_epsilon : float
        Pure epsilon of one report, under replace-one: 2 / noise_multiplier for Laplace noise.
    reports : int
        How many independent nodes' reports are certain to be mixed in every round.
    delta : float
    rounds : int

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """
    positive(local_epsilon=local_epsilon)
    positive_int(reports=reports, rounds=rounds)
    probability(delta=delta)
    each = delta / rounds
    if local_epsilon > math.log(reports / (16 * math.log(2 / each))):
        return rounds * local_epsilon
    growth = math.exp(local_epsilon)
    clones = 8 * math.sqrt(growth * math.log(4 / each) / reports) + 8 * growth / reports
    amplified = math.log1p((growth - 1) / (growth + 1) * clones)
    return rounds * min(local_epsilon, amplified)
