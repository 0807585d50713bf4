"""Searches over prices that are slow to compute: coarse first, then proven on the standard grid.

>>> from dpfl_flower.accounting.events import Gaussian
>>> from dpfl_flower.accounting.units import Relation
>>> price = lambda z: Price([Gaussian(z)], Relation.ADD_OR_REMOVE_ONE)
>>> round(smallest_within(price, 1.0, 1e-5, tolerance=1e-6), 4)
3.7306
"""

import math
from collections.abc import Callable

from dpfl_flower.accounting.accountant import Price
from dpfl_flower.accounting.analytic import gaussian_mu

_LOG_NOISE_RANGE = (math.log(1e-6), math.log(1e9))
_NARROWEST = 1e-6
_CLAMP = 20.0
_COARSE_ENOUGH = 1e-3
_MAX_COARSE = 25
_MAX_FINE = 60
_FIRST_STEP = 0.05


class NotBracketed(Exception):
    """No noise multiplier in the searched range is within the budget."""


class _Bracket:
    """Points of a decreasing function on both sides of its root, and where to look next."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self._low_gap = self._high_gap = math.nan
        self._last: tuple[float, float] | None = None
        self.slope = math.nan

    def add(self, x: float, gap: float) -> None:
        """Take in that the function is ``gap`` at ``x``."""
        if self._last is not None and x != self._last[0] and abs(gap) < _CLAMP:
            slope = (gap - self._last[1]) / (x - self._last[0])
            if slope < 0 and abs(self._last[1]) < _CLAMP:
                self.slope = slope
        self._last = (x, gap)
        if gap > 0:
            self.low, self._low_gap = max(self.low, x), gap
        else:
            self.high, self._high_gap = min(self.high, x), gap

    def next(self, aim: float) -> float:
        """Return where the function should be ``aim``, strictly inside the bracket."""
        assert self._last is not None
        x, gap = self._last
        slope = self.slope if math.isfinite(self.slope) else -1.5
        step = (aim - gap) / slope
        guess = x + max(-1.0, min(1.0, step))
        inside = self.low < guess < self.high
        return guess if inside else (self.low + self.high) / 2


def _gap(epsilon: float, target: float) -> float:
    """Return how far epsilon is above its target, in logarithms, clamped."""
    if epsilon <= 0:
        return -_CLAMP
    return max(-_CLAMP, min(_CLAMP, math.log(epsilon / target)))


def smallest_within(
    price: Callable[[float], Price], target: float, delta: float, *, tolerance: float
) -> float:
    """Return the smallest x whose price is at most ``target``, for prices that fall with x.

    The price of the result is computed on the standard grid and is at most ``target``; it is above
    ``target * (1 - tolerance)`` wherever the price is continuous.

    Raises
    ------
    NotBracketed
        If there is none up to 1e9.
    """
    aim = -tolerance / 2
    x, slope = _guess_noise(price, target, delta), -1.5
    if price(math.exp(x)).gridded:
        x, slope = _coarse_root(price, target, delta, x)
    bracket = _Bracket(*_LOG_NOISE_RANGE)
    bracket.slope = slope
    found = math.nan
    for _ in range(_MAX_FINE):
        gap = _gap(price(math.exp(x)).epsilon(delta), target)
        bracket.add(x, gap)
        if gap <= 0:
            found = x if math.isnan(found) else min(found, x)
            if gap >= -tolerance:
                break
        if bracket.high - bracket.low < _NARROWEST:
            break
        x = bracket.next(aim)
    if math.isnan(found):
        raise NotBracketed(f"no price up to 1e9 is within {target}")
    return math.exp(found)


def _coarse_root(
    price: Callable[[float], Price], target: float, delta: float, x: float
) -> tuple[float, float]:
    """Return about where the price is ``target``, and its slope, from coarse grids.

    The error of a grid falls with the square of its interval, so two grids tell the limit.
    """
    coarseness = price(math.exp(x)).coarsest(target)
    bracket = _Bracket(*_LOG_NOISE_RANGE)
    gap = 0.0
    for _ in range(_MAX_COARSE):
        gap = _gap(price(math.exp(x)).epsilon(delta, coarseness=coarseness), target)
        bracket.add(x, gap)
        if abs(gap) < _COARSE_ENOUGH and math.isfinite(bracket.slope):
            break
        if bracket.high - bracket.low < _NARROWEST:
            break
        x = bracket.next(0.0)
    slope = bracket.slope if math.isfinite(bracket.slope) else -1.5
    if coarseness > 1:
        finer = price(math.exp(x)).epsilon(delta, coarseness=coarseness // 2)
        limit = (4 * finer - target * math.exp(gap)) / 3
        gap = _gap(limit, target)
    return x - gap / slope, slope


def _guess_noise(price: Callable[[float], Price], target: float, delta: float) -> float:
    """Return about where the price is ``target``, by the central limit theorem."""
    mu = gaussian_mu(target, delta)
    low, high = _LOG_NOISE_RANGE
    for _ in range(40):
        middle = (low + high) / 2
        if price(math.exp(middle)).approximate_mu() > mu:
            low = middle
        else:
            high = middle
    return high


def largest_within(
    price: Callable[[int], Price], target: float, delta: float, *, at_most: int
) -> int:
    """Return the largest n <= at_most priced at most ``target``, for prices that rise with n.

    0 is returned without asking whether price(0) is within the target.
    """

    def within(n: int) -> bool:
        return price(n).epsilon(delta) <= target

    guess = _guess_count(price, target, delta, at_most)
    if guess >= at_most / 2 and within(at_most):
        return at_most
    low, high = 0, at_most + 1
    n, step = max(1, min(guess, at_most)), 1
    last: tuple[float, float] | None = None
    while high - low > 1:
        n = max(low + 1, min(n, high - 1))
        found = price(n).epsilon(delta)
        if found <= target:
            low = n
        else:
            high = n
        n, last = _next_count(n, found, last, target), (math.log(n), _gap(found, target))
        if not low < n < high:
            # The root is next to a bound: step away from it, further each time.
            n = low + step if n <= low else high - step
            step *= 2
            if not low < n < high:
                n = (low + high) // 2
    return low


def _next_count(n: int, found: float, last: tuple[float, float] | None, target: float) -> int:
    """Return the count at which a power law through the last two prices meets the target."""
    x, gap = math.log(n), _gap(found, target)
    slope = 0.75  # between the square root of few releases and the linear growth of many
    if last is not None and x != last[0]:
        slope = max(0.05, min(3.0, (gap - last[1]) / (x - last[0])))
    return math.floor(math.exp(min(40.0, x - gap / slope)))


def _guess_count(price: Callable[[int], Price], target: float, delta: float, at_most: int) -> int:
    mu = gaussian_mu(target, delta)
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if price(middle).approximate_mu() > mu:
            high = middle - 1
        else:
            low = middle
    return low
