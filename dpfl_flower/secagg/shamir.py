"""Shamir's secret sharing of 256-bit secrets (Shamir, "How to share a secret", CACM 1979).

A secret is the constant term of a random polynomial of degree ``threshold - 1`` over the integers
mod p = 2^256 + 297, the smallest prime above all secrets; share x is its value at x = 1, 2, ... Any
``threshold`` shares give the secret, fewer say nothing about it (coefficients are within 2^-127 of
uniform).

>>> from dpfl_flower.rng import secure
>>> shares = split(b"k" * 32, threshold=2, count=3, rng=secure())
>>> combine({1: shares[0], 3: shares[2]}) == b"k" * 32
True
"""

from collections.abc import Mapping
from typing import Final

from dpfl_flower import checks
from dpfl_flower.rng import RandomSource

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "combine", "split"]

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
_DRAW_BYTES: Final = 48
_STEPS: Final = 24  # between two reductions: each adds the few bits of an x


def split(secret: bytes, *, threshold: int, count: int, rng: RandomSource) -> list[bytes]:
    """Return ``count`` shares of 33 bytes; the one at index i belongs to x = i + 1.

    Raises
    ------
    ValueError
        Unless the secret has 32 bytes and ``1 <= threshold <= count``.
    """
    checks.positive_int(threshold=threshold, count=count)
    checks.at_most(count, threshold=threshold)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret of {len(secret)} bytes must have {SECRET_BYTES}")
    coefficients = [int.from_bytes(secret, "big")]
    # 384 bits mod p: within 2^-127 of uniform. By rejection half of 257 bits would be drawn again.
    drawn = rng.random_bytes(_DRAW_BYTES * (threshold - 1))
    coefficients += [
        int.from_bytes(drawn[start : start + _DRAW_BYTES], "big") % PRIME
        for start in range(0, len(drawn), _DRAW_BYTES)
    ]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for index, coefficient in enumerate(reversed(coefficients), start=1):
            value = value * x + coefficient
            if not index % _STEPS:
                value %= PRIME
        shares.append((value % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that these shares, by their x, interpolate at 0.

    With fewer shares than the threshold, or a wrong one among them, the outcome is another secret:
    check it against what is known of the right one.

    Raises
    ------
    ValueError
        If there is no share, a share is no field element, an x is out of range, or the outcome has
        more than 256 bits, which no secret has.
    """
    if not shares:
        raise ValueError("shares={} must not be empty")
    points = {}
    for x, share in shares.items():
        checks.positive_int(x=x)
        value = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise ValueError(f"the share of x={x} must be {SHARE_BYTES} bytes below the prime")
        points[x] = value
    secret = 0
    for x, value in points.items():
        numerator = denominator = 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        secret += value * numerator * pow(denominator, -1, PRIME)
    secret %= PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares do not fit together: no secret of 256 bits has them")
    return secret.to_bytes(SECRET_BYTES, "big")
