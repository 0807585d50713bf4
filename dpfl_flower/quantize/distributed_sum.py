"""A sum of rotated, rounded and bounded vectors, to which noise is added in integers.

>>> grid = DistributedGrid.within(10_000, dimension=2, bits=24)
>>> total = DistributedSum(grid, clip_norm=1.0, rotation_seed=b"round 1")
>>> total.add([np.array([30.0, 40.0])])  # clipped to norm 1
>>> total.add([np.array([np.nan, 0.0])])  # contributes zeros
>>> modular = reduced(total.total, bits=grid.bits)  # what a node would mask, once noise is added
>>> decoded(modular, grid, clip_norm=1.0, rotation_seed=b"round 1", expected_cohort=1).round(3)
array([0.6, 0.8])
"""

import math
from collections.abc import Sequence
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks, clipping
from dpfl_flower.layout import Array
from dpfl_flower.quantize.distributed_grid import DistributedGrid
from dpfl_flower.quantize.flat import flat_arrays
from dpfl_flower.quantize.modular import centred, reduced
from dpfl_flower.quantize.rotation import Rotation
from dpfl_flower.rng import RandomSource, secure

__all__ = ["DistributedSum", "decoded", "reduced"]

_ATTEMPTS: Final = 64
"""A vector of at most the clip norm fails them all with probability exp(-32) at most."""

_ROW: Final = 1 << 10


@final
class DistributedSum:
    """The sum of weighted, clipped, rotated and rounded updates: exact, whatever their order.

    What a unit contributes depends on its own values, its weight, coins of its own and public
    constants alone, and its L2 norm is at most ``grid.sensitivity_units``: that is checked on the
    integers. Algorithm 1 of Kairouz, Liu, Steinke, arXiv 2102.06387, up to the noise.

    Parameters
    ----------
    grid : DistributedGrid
    clip_norm : float
        C, in the units of the update.
    rotation_seed : bytes
        The round's public seed.
    rng : RandomSource or None
        Of the rounding; the operating system's by default. Privacy does not depend on it.

    Raises
    ------
    ValueError
        Naming the argument.
    """

    def __init__(
        self,
        grid: DistributedGrid,
        *,
        clip_norm: float,
        rotation_seed: bytes,
        rng: RandomSource | None = None,
    ) -> None:
        checks.positive(clip_norm=clip_norm)
        if not math.isfinite(grid.clip_units / clip_norm):
            raise ValueError(f"clip_norm={clip_norm!r} must be >= {grid.clip_units / 1e308!r}")
        self._grid = grid
        self._clip_norm = float(clip_norm)
        self._rotation = Rotation(grid.dimension, rotation_seed)
        self._rng = secure() if rng is None else rng
        self._total = np.zeros(grid.padded, np.int64)

    @property
    def total(self) -> NDArray[np.int64]:
        """The sum so far, a new array of length ``grid.padded``; not reduced, without noise."""
        return self._total.copy()

    def add(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        """Add one unit's contribution; parameters and errors as for :meth:`contribution`."""
        self._total += self.contribution(values, reference, weight=weight)

    def contribution(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
    ) -> NDArray[np.int64]:
        """Return what :meth:`add` would add: ``round(rotate(clip(weight (values - reference))))``.

        Rounding is drawn afresh with each call, and on its mean for vectors within the clip norm,
        but for what drawing again takes: at most a factor of 1 / (1 - beta) of a probability.

        Parameters
        ----------
        values : sequence of floating arrays
            All released arrays, in the layout's order; ``grid.dimension`` entries in all.
        reference : sequence of floating arrays or None
            What to subtract, of the same sizes; None when ``values`` is the update already.
        weight : float
            In [0, 1], applied before clipping.

        Returns
        -------
        int64 array, shape (grid.padded,)
            All zeros when an entry of the difference, or its norm, is not finite.

        Raises
        ------
        ValueError
            When the weight is out of range or the arrays do not fit the grid.
        """
        checks.non_negative(weight=weight)
        checks.at_most(1, weight=weight)
        zeros = np.zeros(self._grid.padded, np.int64)
        with np.errstate(all="ignore"):  # overflow and NaN have a defined outcome: zeros
            update = self._flat(values)
            if reference is not None:
                update -= self._flat(reference)
            length = clipping.norm([update])
            if not math.isfinite(length) or length == 0:
                return zeros
            # Divided first, so that what comes of numbers near 1e308 or 1e-308 does not overflow.
            update /= length
            update *= self._grid.clip_units * min(1.0, weight * (length / self._clip_norm))
        rotated = self._rotation.apply(update)
        for _ in range(_ATTEMPTS):
            integers = np.floor(rotated + self._uniform(rotated.size))
            if _within(integers, self._grid.sensitivity_units):
                return integers.astype(np.int64)
        return zeros

    def _uniform(self, n: int) -> NDArray[np.float64]:
        """Return odd multiples of 2^-33, uniform in (0, 1)."""
        words = self._rng.uint64((n + 1) // 2).view(np.uint32)[:n]
        return (words.astype(np.float64) + 0.5) * 2.0**-32

    def _flat(self, arrays: Sequence[Array]) -> NDArray[np.float64]:
        flat = flat_arrays(arrays, self._grid.dimension)
        return np.concatenate([array.astype(np.float64) for array in flat])


def decoded(
    modular: NDArray[np.int64],
    grid: DistributedGrid,
    *,
    clip_norm: float,
    rotation_seed: bytes,
    expected_cohort: float,
) -> NDArray[np.float64]:
    """Return the noisy mean that an unmasked modular sum stands for.

    Centred modulo 2^bits, rotated back, scaled, divided by the public ``expected_cohort``. All of
    it is post-processing of what the noise already covers.

    Parameters
    ----------
    modular : int64 array, shape (grid.padded,)
        Noise included; nothing that is not noised may come here.

    Returns
    -------
    float64 array, shape (grid.dimension,)
    """
    checks.positive(expected_cohort=expected_cohort)
    sums = centred(modular, bits=grid.bits).astype(np.float64)
    rotation = Rotation(grid.dimension, rotation_seed)
    return rotation.undo(sums) * (grid.unit_size(clip_norm) / expected_cohort)


def _within(integers: NDArray[np.float64], bound: int) -> bool:
    """Return whether the L2 norm of a vector of integers is at most ``bound``, without error.

    Entries of at most 2^26 and rows of at most 2^10 of them, so that every partial sum of squares
    is below 2^62; between rows Python's integers go on.
    """
    if not np.abs(integers).max() <= bound:
        return False
    whole = integers.astype(np.int64)
    rows = (whole[start : start + _ROW] for start in range(0, whole.size, _ROW))
    return sum(int(row @ row) for row in rows) <= bound * bound
