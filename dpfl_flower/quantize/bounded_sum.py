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
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks, clipping
from dpfl_flower.clipping import Norm
from dpfl_flower.layout import Array, as_numpy, dtype_name, is_floating
from dpfl_flower.quantize import kernels
from dpfl_flower.quantize.dither import dither
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

_Put = Callable[[int, kernels.Rows], None]


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
        self._total = np.zeros(grid.width, np.int64)
        # A float32 sum of integers is exact below 2^24; it is emptied into the total before that.
        self._pending: list[NDArray[np.float32]] = []
        self._pending_units = 0

    @property
    def total(self) -> NDArray[np.int64]:
        """The sum so far, a new array of length ``grid.width``; the indicator's sum comes last."""
        self._flush()
        return self._total.copy()

    def contribution(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
    ) -> NDArray[np.int64]:
        """Return what :meth:`add` would add: ``round(clip(weight * (values - reference)))``.

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
        int64 array, shape (grid.width,)
            All zeros when an entry of the difference, or its norm, is not finite.

        Raises
        ------
        ValueError
            When the weight is out of range or the arrays do not fit the grid.
        """
        grid = self._grid
        vector = np.zeros(grid.width, np.int64)
        parts = [vector[where] for where in kernels.blocks(grid.dimension)]

        def put(index: int, integers: kernels.Rows) -> None:
            np.copyto(parts[index], integers.values, casting="unsafe")

        def take_back(index: int, _: kernels.Rows) -> None:
            parts[index].fill(0)

        indicator = self._place(values, reference, weight, put, take_back)
        if grid.indicator_units:
            vector[-1] = indicator
        return vector

    def add(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        """Add one unit's contribution; parameters and errors as for :meth:`contribution`."""
        where = list(kernels.blocks(self._grid.dimension))

        def put(index: int, integers: kernels.Rows) -> None:
            if integers.values.dtype == _FLOAT32:
                np.add(pending[index], integers.values, out=pending[index])
            else:
                self._total[where[index]] += integers.values.astype(np.int64)

        def take_back(index: int, integers: kernels.Rows) -> None:
            np.negative(integers.values, out=integers.values)
            put(index, integers)

        pending = self._room_for_one()
        indicator = self._place(values, reference, weight, put, take_back)
        self._pending_units += 1
        if self._grid.indicator_units:
            self._total[-1] += indicator

    def _place(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None,
        weight: float,
        put: _Put,
        take_back: _Put,
    ) -> int:
        """Put one unit's integers where they belong, block by block, and return its indicator."""
        if not (_is_number(weight) and 0 <= weight <= 1):
            raise ValueError(f"weight={weight!r} must be in [0, 1]")
        flat = self._flat(values)
        flat_reference = None if reference is None else self._flat(reference)
        if flat_reference is not None:
            found, sizes = [a.size for a in flat_reference], [a.size for a in flat]
            if found != sizes:
                raise ValueError(f"reference has arrays of {found} entries, must be {sizes}")
        with np.errstate(all="ignore"):  # overflow and NaN have a defined outcome: zeros
            work, length = self._difference(flat, flat_reference)
            if not math.isfinite(length):
                return 0
            factor = self._factor(weight, length)
            least, most = _PLAIN_FLOAT32_FACTORS
            if factor and work.difference.dtype == _FLOAT32 and not least < factor < most:
                difference, work = work.difference, self._workspace(_FLOAT64)
                np.copyto(work.difference, difference)
            if not self._fit(work, factor, put, take_back):
                return 0
        indicator = self._grid.indicator_units
        return indicator if weight * length <= self._clip_norm else -indicator

    def _factor(self, weight: float, length: float) -> float:
        """Return what turns a difference of this norm into grid units, weighted and clipped."""
        if weight * length <= self._clip_norm:
            return weight * (self._grid.clip_units / self._clip_norm)
        return _leading_bits(self._grid.clip_units / length)

    def _difference(
        self,
        values: Sequence[NDArray[np.generic]],
        reference: Sequence[NDArray[np.generic]] | None,
    ) -> tuple[kernels.Workspace, float]:
        """Return ``values - reference`` in a workspace, and its norm, NaN or inf included."""
        grid = self._grid
        wide = grid.sensitivity_units > _LARGEST_FLOAT32_BOUND or any(
            array.dtype == _FLOAT64 for array in (*values, *(reference or ()))
        )
        work = self._workspace(_FLOAT64 if wide else _FLOAT32)
        # A long vector's norm is summed on the way, a short one's in float64 throughout.
        quick = not wide and grid.norm is Norm.L2 and grid.dimension > kernels.BLOCK
        squares = kernels.PowerSum(Norm.L2, grid.dimension, quick=True)
        for block in work.subtract(values, reference):
            if quick:
                squares.see(block.difference)
        least, most = _PLAIN_FLOAT32_SQUARES
        if quick and least < squares.value < most:
            return work, math.sqrt(squares.value)
        return work, clipping.norm([work.difference], grid.norm)

    def _fit(self, work: kernels.Workspace, factor: float, put: _Put, take_back: _Put) -> bool:
        """Round and put, shrinking until the bound holds; False: nothing was put.

        Blocks are put as they are rounded, before the bound is known; integers add without error,
        so that taking them back leaves no trace.
        """
        grid, dtype = self._grid, work.difference.dtype

        def check(*, quick: bool) -> kernels.NormCheck:
            return kernels.NormCheck(grid.sensitivity_units, grid.norm, grid.dimension, quick=quick)

        for _ in range(_ATTEMPTS):
            scale = _at_most(factor, dtype)
            found = check(quick=dtype == _FLOAT32)
            for index, block in enumerate(work.blocks):
                integers = block.round(scale)
                found.see(integers)
                put(index, integers)
            if not found.conclusive:
                found = check(quick=False)
                for block in work.blocks:
                    found.see(block.round(scale))
            if found.within:
                return True
            for index, block in enumerate(work.blocks):
                take_back(index, block.round(scale))
            factor *= (1 - 2.0**-10) / found.excess
        return False

    def _workspace(self, dtype: np.dtype[np.generic]) -> kernels.Workspace:
        if dtype not in self._workspaces:
            self._workspaces[dtype] = kernels.Workspace(self._grid.dimension, dtype, self._dither)
        return self._workspaces[dtype]

    def _flat(self, arrays: Sequence[Array]) -> list[NDArray[np.generic]]:
        for index, array in enumerate(arrays):
            if not is_floating(array):
                raise ValueError(
                    f"array {index} has dtype {dtype_name(array)}, must be floating: "
                    "integer and boolean arrays are never released"
                )
        flat = [as_numpy(array).reshape(-1) for array in arrays]
        size = sum(array.size for array in flat)
        if size != self._grid.dimension:
            raise ValueError(f"arrays have {size} entries, must be {self._grid.dimension}")
        return flat

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

    def _flush(self) -> None:
        if self._pending_units and self._pending:
            for where, block in zip(
                kernels.blocks(self._grid.dimension), self._pending, strict=True
            ):
                self._total[where] += block.astype(np.int64)
                block.fill(0)
        self._pending_units = 0


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
