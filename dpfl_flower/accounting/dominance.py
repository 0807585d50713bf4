"""Which of several releases is the dearest, whatever it is composed with.

A pair of distributions whose privacy profile delta(epsilon) lies above another's everywhere stays
above it under composition with anything else (Zhu, Dong & Wang, arXiv 2106.08567, Theorem 10), so
single releases priced in isolation decide.

>>> from dpfl_flower.accounting.events import Gaussian
>>> dearest([Gaussian(2.0), Gaussian(1.0)], Relation.ADD_OR_REMOVE_ONE)
[Gaussian(noise_multiplier=1.0)]
"""

import math
from collections.abc import Iterable, Sequence

from dpfl_flower.accounting import rdp
from dpfl_flower.accounting.accountant import Price
from dpfl_flower.accounting.events import Event, Gaussian, count_events
from dpfl_flower.accounting.units import Relation

# Where profiles are compared; between and beyond these points they are taken to keep their order.
_EPSILONS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

# What the pricing of one release is exact to.
_ROUNDING = 1e-15


def dearest(events: Iterable[Event], relation: Relation) -> list[Event]:
    """Return the events that no other one dominates: one, or several that cannot be ranked.

    Charging all that is returned costs at least as much as charging any one of ``events``.
    """
    candidates: list[tuple[Event, Sequence[float]]] = []
    for event in dict.fromkeys(events):
        price = Price([event], relation)
        profile = [price.delta(epsilon) for epsilon in _EPSILONS]
        if any(_dominates(other, theirs, event, profile) for other, theirs in candidates):
            continue
        candidates = [
            (other, theirs)
            for other, theirs in candidates
            if not _dominates(event, profile, other, theirs)
        ]
        candidates.append((event, profile))
    return [event for event, _ in candidates]


def _dominates(
    event: Event, profile: Sequence[float], other: Event, other_profile: Sequence[float]
) -> bool:
    """Return whether ``event`` costs at least as much as ``other`` in any company."""
    # What is priced by Rényi curves does not rank against other prices: they are only bounds.
    if _is_by_curve(event) != _is_by_curve(other):
        return False
    mu, other_mu = _mu_squared(event), _mu_squared(other)
    if mu is not None and other_mu is not None:
        return mu >= other_mu
    # Profiles that tie at every point, because all of them are 1 or 0 there, rank nothing.
    gaps = [a - b for a, b in zip(profile, other_profile, strict=True)]
    return min(gaps) >= -_ROUNDING and max(gaps) > _ROUNDING


def _mu_squared(event: Event) -> float | None:
    """Return mu^2 of a composition of Gaussians that are not sampled, which it orders exactly."""
    total = 0.0
    for part, count in count_events([event]).items():
        if not isinstance(part, Gaussian):
            return None
        total += count / part.noise_multiplier**2 if part.noise_multiplier else math.inf
    return total


def _is_by_curve(event: Event) -> bool:
    return any(rdp.needed(part) for part in count_events([event]))
