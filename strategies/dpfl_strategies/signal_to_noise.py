"""How much of what was released is signal, told from the released value and the known noise.

>>> signal_to_noise(np.array([3.0, -3.0]), noise_stddev=1.5)
3.0
"""

import math

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

__all__ = ["in_words", "signal_to_noise"]


def signal_to_noise(update: NDArray[np.float64], *, noise_stddev: float) -> float:
    """Estimate the mean's power over the noise's: ``max(0, |y|^2 / (d sigma^2) - 1)``.

    With ``y = x + n``, n of d independent entries of mean 0 and standard deviation sigma,
    ``E |y|^2 = |x|^2 + d sigma^2``, so without the maximum the estimate is unbiased; where there is
    no signal and n is Gaussian its standard deviation is ``sqrt(2/d)``. Made of the released value
    and a public constant, it costs no privacy (post-processing: Dwork and Roth, Proposition 2.1).
    Infinite without noise.

    Parameters
    ----------
    update : float64 array, shape (d,)
        The released noisy mean.
    noise_stddev : float
        Of the noise on each entry of ``update``.
    """
    checks.non_negative(noise_stddev=noise_stddev)
    if not noise_stddev:
        return math.inf
    scaled = update / noise_stddev
    return max(0.0, float(scaled @ scaled) / scaled.size - 1)


def in_words(estimate: float | None) -> str:
    """Return what a progress line says of a round's estimate; None where it released nothing.

    >>> in_words(0.041), in_words(None)
    ('signal-to-noise 0.041', 'nothing released')
    """
    return "nothing released" if estimate is None else f"signal-to-noise {estimate:.2g}"
