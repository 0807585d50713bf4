"""Integers modulo 2^b, as masked vectors hold them.

>>> reduced(np.array([-1, 256 + 3]), bits=8)
array([255,   3])
>>> centred(np.array([255, 3]), bits=8)
array([-1,  3])
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

__all__ = ["MOST_BITS", "centred", "reduced"]

MOST_BITS: Final = 62
"""So that residues and their differences are int64."""


def reduced(values: NDArray[np.int64], *, bits: int) -> NDArray[np.int64]:
    """Return the residues in [0, 2^bits)."""
    _check(values, bits)
    return values & np.int64((1 << bits) - 1)


def centred(values: NDArray[np.int64], *, bits: int) -> NDArray[np.int64]:
    """Return the residues in [-2^(bits - 1), 2^(bits - 1))."""
    half = np.int64(1 << (bits - 1))
    residues = reduced(values, bits=bits)
    return residues - ((residues & half) << np.int64(1))


def _check(values: NDArray[np.int64], bits: int) -> None:
    checks.positive_int(bits=bits)
    checks.at_most(MOST_BITS, bits=bits)
    if values.dtype != np.int64:
        raise ValueError(f"dtype={values.dtype} must be int64")
