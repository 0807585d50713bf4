"""An exact integer sum to which each unit contributes a bounded vector.

>>> import numpy as np
>>> from dpfl_flower.quantize import IntegerGrid
>>> total = BoundedSum(IntegerGrid.for_noise_multiplier(1.0, 2), clip_norm=1.0)
>>> total.add([np.array([30.0, 40.0])])  # clipped to norm 1
>>> total.add([np.array([np.nan, 0.0])])  # contributes zeros
>>> total.total
array([ 9830, 13107])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks, clipping
from dpfl_flower.clipping import Norm
from dpfl_flower.layout import Array
from dpfl_flower.quantize import kernels
from dpfl_flower.quantize.dither import dither
from dpfl_flower.quantize.flat import flat_arrays
from dpfl_flower.quantize.grid import IntegerGrid, Rounding

__all__ = ["BoundedSum"]

_FLOAT32: Final = np.dtype(np.float32)
_FLOAT64: Final = np.dtype(np.float64)
_EXACT_FLOAT32: Final = 1 << 24
_LARGEST_FLOAT32_BOUND: Final = 1 << 20
"""Above this many units float32 would not leave the dither four bits: float64 takes over."""
_PLAIN_FLOAT32_FACTORS: Final = (2.0**-100, 2.0**100)
_PLAIN_FLOAT32_SQUARES: Final = (1e-20, 3e38)
"""Within these no square that matters has vanished or overflowed."""
_ATTEMPTS: Final = 8


class BoundedSum:
    """The sum of weighted, clipped and rounded updates, exact and independent of their order.

    What a unit contributes depends on its own values, its weight and public constants alone, and
    its integer norm is at most ``grid.sensitivity_units``: that is checked on the integers. Memory
    is a fixed number of vectors, whatever the cohort. Not for use by two threads at a time.

    Parameters
    ----------
    grid : IntegerGrid
    clip_norm : float
        C, in the units of the update.
    dither_seed : bytes or None
        The round's public seed, for a grid that rounds ``DITHERED`` and only for that.

    Raises
    ------
    ValueError
        Naming the argument.
    """

    def __init__(
        self, grid: IntegerGrid, *, clip_norm: float, dither_seed: bytes | None = None
    ) -> None:
        checks.positive(clip_norm=clip_norm)
        if not math.isfinite(grid.clip_units / clip_norm):
            raise ValueError(f"clip_norm={clip_norm!r} must be >= {grid.clip_units / 1e308!r}")
        if (grid.rounding is Rounding.DITHERED) != (dither_seed is not None):
            raise ValueError(
                f"dither_seed={dither_seed!r} must be given where rounding is dithered and only "
                f"there; rounding={grid.rounding.value!r}"
            )
        self._grid = grid
        self._clip_norm = float(clip_norm)
        self._dither = None
        if dither_seed is not None:
            self._dither = dither(dither_seed, grid.dimension)
        self._workspaces: dict[np.dtype[np.generic], kernels.Workspace] = {}
        # A float32 sum of integers is exact below 2^24; it is emptied into the total before that.
        self._pending: list[NDArray[np.float32]] = []
        self._pending_units = 0

    @cached_property
    def _total(self) -> NDArray[np.int64]:
        return np.zeros(self._grid.width, np.int64)  # a node that is one unit sums nothing

    @property
    def total(self) -> NDArray[np.int64]:
        """The sum so far, a new array of length ``grid.width``: updates, indicators, metrics."""
        total = self._total.copy()
        self._add_pending(total)
        return total

    def contribution(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
        metrics: Sequence[float] = (),
    ) -> NDArray[np.int32]:
        """Return what :meth:`add` would add: ``round(clip(weight * (values - reference)))``.

        Parameters
        ----------
        values : sequence of floating arrays
            All released arrays, in the layout's order; ``grid.dimension`` entries in all.
        reference : sequence of floating arrays or None
            What to subtract, of the same sizes; None when ``values`` is the update already.
        weight : float
            In [0, 1], applied before clipping. Metrics are not weighted.
        metrics : sequence of float, of length ``grid.num_metrics``
            This unit's own, each as its place in [-1, 1]: clipped to that, and 0 where it is not
            finite.

        Returns
        -------
        int32 array, shape (grid.width,)
            No entry exceeds the bound, which is at most 2^26: to be summed as int64. All zeros when
            an entry of the difference, or its norm, is not finite: metrics included.

        Raises
        ------
        ValueError
            When the weight is out of range, or arrays or metrics do not fit the grid.
        """
        grid = self._grid
        vector = np.empty(grid.width, np.int32)
        places = self._metric_integers(metrics)
        work, indicator = self._integers(values, reference, weight, pending=None)
        integers = 0 if work is None else work.values
        np.copyto(vector[: grid.dimension], integers, casting="unsafe")
        if grid.indicator_units:
            vector[grid.dimension] = indicator
        if places is not None:
            vector[-places.size :] = 0 if work is None else places
        return vector

    def add(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
        metrics: Sequence[float] = (),
    ) -> None:
        """Add one unit's contribution; parameters and errors as for :meth:`contribution`."""
        grid = self._grid
        places = self._metric_integers(metrics)
        pending = self._room_for_one()
        work, indicator = self._integers(values, reference, weight, pending=pending)
        self._pending_units += 1
        if work is not None and work.values.dtype == _FLOAT64:
            for where, block in zip(kernels.blocks(grid.dimension), work.blocks, strict=True):
                self._total[where] += block.values.astype(np.int64)
        if grid.indicator_units:
            self._total[grid.dimension] += indicator
        if places is not None and work is not None:
            self._total[-places.size :] += places

    def _metric_integers(self, metrics: Sequence[float]) -> NDArray[np.int64] | None:
        """Return the metrics' integers, none above the grid's bound; None for a grid without."""
        count, units = self._grid.num_metrics, self._grid.metric_units
        if len(metrics) != count:
            raise ValueError(f"metrics has {len(metrics)} entries, must be {count}, the grid's")
        if not count:
            return None
        with np.errstate(all="ignore"):  # overflow and NaN have a defined outcome: zeros
            places = np.asarray(metrics, np.float64)
            integers = np.clip(np.rint(places * units), -units, units)
        integers[~np.isfinite(places)] = 0
        return integers.astype(np.int64)

    def _integers(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None,
        weight: float,
        *,
        pending: Sequence[NDArray[np.float32]] | None,
    ) -> tuple[kernels.Workspace | None, int]:
        """Return a workspace that holds one unit's integers, None for zeros, and its indicator.

        Where they are float32 they have also been added to ``pending``.
        """
        if not (_is_number(weight) and 0 <= weight <= 1):
            raise ValueError(f"weight={weight!r} must be in [0, 1]")
        dimension = self._grid.dimension
        update = _Update(
            flat_arrays(values, dimension),
            None if reference is None else flat_arrays(reference, dimension),
        )
        with np.errstate(all="ignore"):  # overflow and NaN have a defined outcome: zeros
            work, length = self._difference(update)
            if not math.isfinite(length):
                return None, 0
            factor = self._factor(weight, length)
            least, most = _PLAIN_FLOAT32_FACTORS
            if factor and work.values.dtype == _FLOAT32 and not least < factor < most:
                work = self._workspace(_FLOAT64)
                update.subtract(work)
            if not self._fit(update, work, factor, pending):
                return None, 0
        indicator = self._grid.indicator_units
        return work, indicator if weight * length <= self._clip_norm else -indicator

    def _factor(self, weight: float, length: float) -> float:
        """Return what turns a difference of this norm into grid units, weighted and clipped."""
        if weight * length <= self._clip_norm:
            return weight * (self._grid.clip_units / self._clip_norm)
        return _leading_bits(self._grid.clip_units / length)

    def _difference(self, update: "_Update") -> tuple[kernels.Workspace, float]:
        """Return a workspace that holds the difference, and its norm, NaN or inf included."""
        grid = self._grid
        wide = update.wide or grid.sensitivity_units > _LARGEST_FLOAT32_BOUND
        work = self._workspace(_FLOAT64 if wide else _FLOAT32)
        # A long vector's norm is summed on the way, a short one's in float64 throughout.
        if not wide and grid.norm is Norm.L2 and grid.dimension > kernels.BLOCK:
            squares = kernels.PowerSum(Norm.L2, grid.dimension, quick=True)
            for block in work.subtract(update.values, update.reference):
                squares.see(block)
            total = squares.value()
            least, most = _PLAIN_FLOAT32_SQUARES
            if least < total < most:
                return work, math.sqrt(total)
        else:
            update.subtract(work)
        return work, clipping.norm([work.values], grid.norm)

    def _fit(
        self,
        update: "_Update",
        work: kernels.Workspace,
        factor: float,
        pending: Sequence[NDArray[np.float32]] | None,
    ) -> bool:
        """Turn the difference into integers within the bound, shrinking it; False if none fit.

        Blocks are added to ``pending`` as they are rounded, while they are in cache and before the
        bound is known; integers add without error, so that taking them back leaves no trace.
        """
        grid, dtype = self._grid, work.values.dtype
        sums = pending if pending is not None and dtype == _FLOAT32 else [None] * len(work.blocks)
        for attempt in range(_ATTEMPTS):
            if attempt:
                update.subtract(work)
            scale = _at_most(factor, dtype)
            check = kernels.NormCheck(
                grid.sensitivity_units, grid.norm, grid.dimension, quick=dtype == _FLOAT32
            )
            for block, sum_ in zip(work.blocks, sums, strict=True):
                block.round(scale)
                check.see(block)
                if sum_ is not None:
                    np.add(sum_, block.values, out=sum_)
            excess = check.excess(work.blocks)
            if not excess:
                return True
            for block, sum_ in zip(work.blocks, sums, strict=True):
                if sum_ is not None:
                    np.subtract(sum_, block.values, out=sum_)
            factor *= (1 - 2.0**-10) / excess
        return False

    def _workspace(self, dtype: np.dtype[np.generic]) -> kernels.Workspace:
        if dtype not in self._workspaces:
            self._workspaces[dtype] = kernels.Workspace(self._grid.dimension, dtype, self._dither)
        return self._workspaces[dtype]

    def _room_for_one(self) -> list[NDArray[np.float32]]:
        """Return the blocks of the pending sum, with room for one more unit's integers."""
        # No entry exceeds the bound once it is checked, nor twice the bound before that.
        most = 2 * self._grid.sensitivity_units
        if (self._pending_units + 1) * most > _EXACT_FLOAT32:
            self._flush()
        if not self._pending:
            vector = np.zeros(self._grid.dimension, np.float32)  # costs nothing until it is used
            self._pending = [vector[where] for where in kernels.blocks(vector.size)]
        return self._pending

    def _add_pending(self, total: NDArray[np.int64]) -> None:
        if self._pending_units:
            where = kernels.blocks(self._grid.dimension)
            for place, block in zip(where, self._pending, strict=True):
                total[place] += block.astype(np.int64)

    def _flush(self) -> None:
        self._add_pending(self._total)
        for block in self._pending:
            block.fill(0)
        self._pending_units = 0


@dataclass(frozen=True)
class _Update:
    """One unit's flat arrays, and what to subtract from them."""

    values: Sequence[NDArray[np.generic]]
    reference: Sequence[NDArray[np.generic]] | None

    def __post_init__(self) -> None:
        if self.reference is not None:
            sizes, found = ([a.size for a in arrays] for arrays in (self.values, self.reference))
            if found != sizes:
                raise ValueError(f"reference has arrays of {found} entries, must be {sizes}")

    @property
    def wide(self) -> bool:
        """Whether an array is float64, so that the arithmetic is too."""
        return any(array.dtype == _FLOAT64 for array in (*self.values, *(self.reference or ())))

    def subtract(self, work: kernels.Workspace) -> None:
        for _ in work.subtract(self.values, self.reference):
            pass


def _leading_bits(factor: float) -> float:
    """Return ``factor`` rounded down to 16 bits.

    The last digits of a norm depend on the order in which a machine sums; they must not show.
    """
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(math.floor(math.ldexp(mantissa, 16)), exponent - 16)


def _at_most(factor: float, dtype: np.dtype[np.generic]) -> np.floating[Any]:
    """Return the largest float32, or float64, that is not above ``factor``."""
    if dtype == _FLOAT64:
        return np.float64(factor)
    nearest = np.float32(factor)
    return nearest if nearest <= factor else np.nextafter(nearest, np.float32(0))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
