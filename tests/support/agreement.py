"""Do two engines train the same model, but for the noise?

>>> rng = np.random.default_rng(0)
>>> models = [{"w": 5 + rng.normal(size=2000)} for _ in range(3)]
>>> require_same_but_for_noise(*models)
>>> models[2]["w"] += 1.0
>>> require_same_but_for_noise(*models)
Traceback (most recent call last):
    ...
AssertionError: 1.49 times as far apart as two runs of one engine
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_MOST = 1.35
_FEWEST_NUMBERS = 1000

Arrays = Mapping[str, NDArray[np.generic]]


def require_same_but_for_noise(one: Arrays, again: Arrays, elsewhere: Arrays) -> None:
    """Require ``elsewhere`` to be as far from two runs of one engine as those are from each other.

    If all three have the same law with independent noise in d numbers, the mean of the two squared
    distances over that of the pair is 1 with a standard deviation of about ``sqrt(3 / d)``: 0.055
    for the 1000 numbers that there must be, so that 1.35 is six of them away. A difference between
    the engines of as much as the noise of one run gives 1.5.
    """
    a, b, c = (_flat(arrays) for arrays in (one, again, elsewhere))
    if a.size < _FEWEST_NUMBERS:
        raise ValueError(f"{a.size} numbers must be >= {_FEWEST_NUMBERS}")
    pair = np.square(a - b).sum()
    assert pair > 0, "two runs gave the same bits: there is no noise"
    ratio = (np.square(c - a).sum() + np.square(c - b).sum()) / 2 / pair
    assert 1 / _MOST < ratio < _MOST, f"{ratio:.2f} times as far apart as two runs of one engine"


def _flat(arrays: Arrays) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(arrays[name]).astype(np.float64) for name in sorted(arrays)])
