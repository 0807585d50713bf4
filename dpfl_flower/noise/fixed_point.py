"""Constants as big integers: ``x`` stands for ``x / 2^bits``, each within a few units.

>>> exp_minus(Fraction(1, 2), bits=64) / 2**64
0.6065306597126334
"""

import math
from collections.abc import Sequence
from fractions import Fraction


def exp_minus(x: Fraction, *, bits: int) -> int:
    """Return ``exp(-x) * 2^bits`` for ``x`` in [0, 1], within 2 units, by Taylor's series."""
    guard = 16  # more than the logarithm of the number of terms
    total = term = 1 << (bits + guard)
    n = 0
    while term:
        n += 1
        term = term * x.numerator // (x.denominator * n)
        total += -term if n % 2 else term
    return nearest_shift(total, guard)


def inverse_sqrt_two_pi(*, bits: int) -> int:
    """Return ``2^bits / sqrt(2 pi)``, within 2 units; pi by Machin's formula."""
    guard = 16
    scale = bits + guard
    pi = 4 * (4 * _arctan_of_inverse(5, scale) - _arctan_of_inverse(239, scale))
    return math.isqrt((1 << 3 * scale) // (2 * pi)) >> guard


def nearest_shift(value: int, shift: int) -> int:
    """Return ``value / 2^shift`` rounded to the nearest integer, for ``shift`` of at least 1."""
    return (value + (1 << (shift - 1))) >> shift


def nearest(value: Fraction, *, bits: int) -> int:
    """Return ``value * 2^bits`` rounded to the nearest integer."""
    return round(value * (1 << bits))


def normalised(weights: Sequence[int], *, bits: int) -> list[int]:
    """Return ``weights[k] / (weights[0] + 2 (weights[1] + ...))`` in units of ``2^-bits``.

    The half of a symmetric law from 0 on, each probability rounded to the nearest unit, but for
    that of 0, which takes what the others leave of 1.

    >>> normalised([2, 1], bits=2)
    [2, 1]
    """
    total = 2 * sum(weights) - weights[0]
    half = total // 2
    result = [((weight << bits) + half) // total for weight in weights]
    result[0] = (1 << bits) - 2 * sum(result[1:])
    return result


def _arctan_of_inverse(n: int, bits: int) -> int:
    power = total = (1 << bits) // n
    odd = 1
    while power:
        power //= -n * n  # the sign alternates; floors cost a unit a term, inside the guard bits
        odd += 2
        total += power // odd
    return total
