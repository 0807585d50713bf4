"""How much noise a budget asks for, and how many rounds it pays for.

Pricing on the standard grid takes about a second, so a search runs on coarse grids, corrects for
them, and then proves its answer on the standard one. Answers are kept on disk: see `cache`.

>>> budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
>>> round(calibrate(budget, None, rounds=1), 4)
3.7306
>>> affordable_rounds(budget, Gaussian(37.4))
100
"""

from collections.abc import Callable, Sequence

from dpfl_flower.accounting.accountant import Price, UnsupportedEvent
from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.cache import remembered
from dpfl_flower.accounting.events import Composed, Event, Gaussian
from dpfl_flower.accounting.sampling import Sampling
from dpfl_flower.accounting.search import NotBracketed, largest_within, smallest_within
from dpfl_flower.checks import positive_int

# Epsilon may stay this far below the budget, relatively.
_TOLERANCE = 1e-4
_MAX_ROUNDS = 10_000_000


def calibrate(
    budget: PrivacyBudget,
    sampling: Sampling | None,
    rounds: int,
    *,
    prior: Sequence[Event] = (),
    total_variation: float = 0.0,
) -> float:
    """Return the smallest Gaussian noise multiplier that keeps ``rounds`` within ``budget``.

    Parameters
    ----------
    budget : PrivacyBudget
        What all of ``prior`` and ``rounds`` together stay within.
    sampling : Sampling, optional
        How each round's cohort is drawn; None: everyone takes part.
    rounds : int
        At least 1.
    prior : sequence of Event
        What was released about the same data before: a ledger's ``events()``.
    total_variation : float
        As in `accountant.epsilon`, for all of it together.

    Returns
    -------
    float
        The noise multiplier, verified: its epsilon is at most the budget's, and within 1e-4 of it.

    Raises
    ------
    UnsupportedEvent
        If the sampling has no price under the budget's relation.
    ValueError
        If ``prior`` leaves nothing of the budget.
    """
    positive_int(rounds=rounds)
    if sampling is not None and not sampling.supports(budget.relation):
        raise UnsupportedEvent(f"{sampling!r} has no price under relation={budget.relation!r}")

    def planned(noise_multiplier: float) -> Event:
        release = Gaussian(noise_multiplier)
        return Composed(release if sampling is None else sampling.event(release), rounds)

    return calibrate_event(planned, budget, prior=prior, total_variation=total_variation)


def calibrate_event(
    make_event: Callable[[float], Event],
    budget: PrivacyBudget,
    *,
    prior: Sequence[Event] = (),
    total_variation: float = 0.0,
) -> float:
    """Return the smallest noise multiplier for which ``make_event`` stays within ``budget``.

    ``make_event`` returns everything that is planned, composed, for a noise multiplier; more noise
    must not cost more. See `calibrate` for the rest.
    """

    def price(noise_multiplier: float) -> Price:
        events = [*prior, make_event(noise_multiplier)]
        return Price(events, budget.relation, total_variation=total_variation)

    def solve() -> float:
        spent = Price(prior, budget.relation).epsilon(budget.delta)
        if spent >= budget.epsilon:
            raise ValueError(
                f"prior events cost epsilon {spent:g}, which must be < {budget.epsilon:g} "
                "to leave room for more"
            )
        return smallest_within(price, budget.epsilon, budget.delta, tolerance=_TOLERANCE)

    # Two probes tell families of events apart; the answer is stored with the event it is true of.
    probes = [make_event(0.7182818), make_event(3.1415926)]
    key = ["calibrate", budget, prior, *probes, total_variation]
    try:
        return remembered(key, solve, proof=make_event)
    except NotBracketed:
        raise ValueError(f"no noise multiplier below 1e9 keeps within {budget}") from None


def affordable_rounds(
    budget: PrivacyBudget,
    event: Event,
    *,
    prior: Sequence[Event] = (),
    at_most: int = _MAX_ROUNDS,
    total_variation: float = 0.0,
) -> int:
    """Return how many releases of ``event`` the budget pays for after ``prior``.

    Parameters
    ----------
    budget : PrivacyBudget
        What all of it stays within.
    event : Event
        One release.
    prior : sequence of Event
        What was released about the same data before.
    at_most : int
        Where to stop counting.
    total_variation : float
        As in `accountant.epsilon`, for all of it together.

    Returns
    -------
    int
        0 to ``at_most``; its epsilon is verified to be at most the budget's.
    """
    positive_int(at_most=at_most)

    def price(count: int) -> Price:
        events = [*prior, Composed(event, count)] if count else list(prior)
        return Price(events, budget.relation, total_variation=total_variation)

    def solve() -> int:
        return largest_within(price, budget.epsilon, budget.delta, at_most=at_most)

    key = ["affordable", budget, prior, event, at_most, total_variation]
    return round(remembered(key, solve))
