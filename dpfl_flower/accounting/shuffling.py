"""What shuffling adds to local noise: a figure to report beside epsilon, never instead of it.

It holds only where something that does not work with the server mixes the reports of a round, all
of them from independent nodes with the same local noise, before anyone sees them. Flower shows the
sender of every message: over Flower alone there is no such thing, and secure aggregation gives a
sum, which distributed noise protects better.

>>> round(shuffled_epsilon(1.0, reports=100_000, delta=1e-6), 3)
0.073
>>> shuffled_epsilon(8.0, reports=100, delta=1e-6)  # too few to hide among: the local epsilon
8.0
>>> round(shuffled_gaussian_epsilon(4.0, reports=100_000, delta=1e-6), 2)
0.38
"""

import math
from dataclasses import dataclass
from typing import Final

from dpfl_flower.accounting.analytic import gaussian_delta, gaussian_epsilon
from dpfl_flower.accounting.statement import rounded_up
from dpfl_flower.checks import non_negative, positive, positive_int, probability
from dpfl_flower.lazily import lazily

special = lazily("scipy.special")

__all__ = ["ShuffledStatement", "shuffled_epsilon", "shuffled_gaussian_epsilon"]

_CANDIDATES: Final = 400
_FOR_SAMPLERS: Final = 2.0**-20
"""The part of delta that is set aside for samplers where nothing is amplified."""


@dataclass(frozen=True)
class ShuffledStatement:
    """What holds for each node if, and only if, a shuffler stood between the nodes and the server.

    It is the word of whoever says so: nothing here can see it.
    """

    epsilon: float
    delta: float
    reports: int
    rounds: int

    def __str__(self) -> str:
        return (
            f"epsilon {rounded_up(self.epsilon)} at delta {self.delta:g} for each node "
            f"(replace-one) in {self.rounds} rounds of at least {self.reports} reports, against "
            "whoever sees them only as a shuffler mixed them: no part of the epsilon that nodes "
            "claim, and not true of a server that is told who sent what, as Flower's is"
        )


def shuffled_epsilon(
    local_epsilon: float,
    *,
    reports: int,
    delta: float,
    rounds: int = 1,
    total_variation: float = 0.0,
) -> float:
    """Return the epsilon of ``rounds`` shuffled rounds, at ``delta`` for all of them.

    Feldman, McMillan, Talwar, arXiv 2012.12803, Theorem 3.1: with ``n`` reports, each epsilon_0-DP
    by itself (replace-one, *pure*: Laplace noise; `shuffled_gaussian_epsilon` is for Gaussian) and
    ``epsilon_0 <= log(n / (16 log(2 / delta)))``, the shuffled reports are (epsilon, delta)-DP with

        epsilon = log(1 + (e^e0 - 1) / (e^e0 + 1) (8 sqrt(e^e0 log(4 / delta) / n) + 8 e^e0 / n))

    Elsewhere, and where that is larger, the local epsilon itself; infinite where delta does not
    cover even that report's ``total_variation``. Rounds compose in the plainest way, with an equal
    part of delta each.

    Parameters
    ----------
    local_epsilon : float
        Pure epsilon of one report, under replace-one: 2 / noise_multiplier for Laplace noise.
    reports : int
        How many independent nodes' reports are certain to be mixed in every round.
    delta : float
    rounds : int
    total_variation : float
        Of one report's noise from its exact law.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """
    positive(local_epsilon=local_epsilon)
    _check(reports, delta, rounds, total_variation)
    amplified = _amplified(
        local_epsilon, reports, delta / rounds, distance=reports * total_variation
    )
    # Without a shuffler only the node's own report counts: the others are the same on either side.
    alone = (
        local_epsilon if _covered(local_epsilon, total_variation, by=delta / rounds) else math.inf
    )
    return rounds * min(alone, amplified)


def shuffled_gaussian_epsilon(
    noise_multiplier: float,
    *,
    reports: int,
    delta: float,
    rounds: int = 1,
    total_variation: float = 0.0,
) -> float:
    """Return the epsilon of ``rounds`` shuffled rounds of Gaussian reports, at ``delta``.

    Derived here. The proof of Theorem 3.1 (arXiv 2012.12803) takes two things of the reports: the
    laws P and P' of the report of the node in question, on either data set, differ by factors of at
    most e^e0, so that they mix ``(e^e0 P - P') / (e^e0 - 1)`` and ``(e^e0 P' - P) / (e^e0 - 1)`` as
    e^e0 : 1 and as 1 : e^e0; and each other report's law is at least ``e^-e0 (P + P') / 2``, so
    that with probability e^-e0 it is a clone of one or the other. Gaussian reports are
    (epsilon_0, delta_0)-indistinguishable, from which both follow for laws near theirs, in total
    variation:

    - P and P' within ``d = delta_0 / (e^e0 + 1)`` (Dwork and Roth, Lemma 3.17);
    - each other, with mass moved to where it is below ``e^-e0 (P + P') / 2``: by at most
      ``e^-e0 delta_0`` before P and P' were changed, and ``e^-e0 d`` more afterwards.

    Together at most ``t = delta_0 (1 + 2 n e^-e0)``, which adds ``(1 + e^epsilon) t`` to delta.
    Half of each round's delta is set aside for it, and epsilon_0 is whatever serves best. The
    result is never more than what the reports cost without a shuffler.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation over the clip norm; replacing a node moves its report by two of those.
    reports, delta, rounds, total_variation
        As for `shuffled_epsilon`.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """
    positive(noise_multiplier=noise_multiplier)
    _check(reports, delta, rounds, total_variation)
    mu, each = 2 / noise_multiplier, delta / rounds
    best = math.inf
    most = _most_local_epsilon(reports, each / 2)
    for step in range(1, _CANDIDATES + 1):
        local = most * step / _CANDIDATES
        if local <= 0:
            break
        # With what doubles cannot tell: two terms are subtracted, of which this is the larger.
        unsure = 2.0**-40 * math.exp(special.log_ndtr(mu / 2 - local / mu))
        local_delta = gaussian_delta(mu, local) + unsure
        distance = local_delta * (1 + 2 * reports * math.exp(-local))
        distance += reports * total_variation
        best = min(best, _amplified(local, reports, each, distance=distance))
    # Rounds compose exactly without a shuffler, and only the node's own reports count.
    aside = delta * _FOR_SAMPLERS if total_variation else 0.0
    alone = gaussian_epsilon(math.sqrt(rounds) * mu, delta - aside)
    if not _covered(alone, rounds * total_variation, by=aside):
        alone = math.inf
    return min(rounds * best, alone)


def _check(reports: int, delta: float, rounds: int, total_variation: float) -> None:
    positive_int(reports=reports, rounds=rounds)
    probability(delta=delta)
    non_negative(total_variation=total_variation)


def _covered(epsilon: float, distance: float, *, by: float) -> bool:
    """Whether ``by`` pays for laws that are so far from those which epsilon holds for."""
    return not distance or math.log1p(math.exp(-epsilon)) + epsilon + math.log(distance) <= (
        math.log(by)
    )


def _most_local_epsilon(reports: int, delta: float) -> float:
    return math.log(reports / (16 * math.log(2 / delta)))


def _amplified(local_epsilon: float, reports: int, delta: float, *, distance: float) -> float:
    """Return the epsilon of one round, infinite where the theorem gives none.

    ``distance`` bounds the total variation of all reports from laws that are pure.
    """
    left = delta / 2 if distance else delta
    if local_epsilon > _most_local_epsilon(reports, left):
        return math.inf
    growth = math.exp(local_epsilon)
    clones = 8 * math.sqrt(growth * math.log(4 / left) / reports) + 8 * growth / reports
    found = math.log1p((growth - 1) / (growth + 1) * clones)
    return found if _covered(found, distance, by=delta - left) else math.inf
