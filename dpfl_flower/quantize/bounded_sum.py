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

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks, clipping
from dpfl_flower.clipping import Norm
from dpfl_flower.layout import Array, as_numpy, dtype_name, is_floating
from dpfl_flower.quantize import kernels
from dpfl_flower.quantize.dither import dither
from dpfl_flower.quantize.grid import IntegerGrid, Rounding

__all__ = ["BoundedSum"]

_EXACT_FLOAT32 = 1 << 24
_LARGEST_FLOAT32_BOUND = 1 << 20
"""Above this many units float32 would not leave the dither four bits: float64 takes over."""
_ATTEMPTS = 8
_NORMAL_FLOAT32 = (2.0**-100, 2.0**100)


class BoundedSum:
    """The sum of weighted, clipped and rounded updates, exact and independent of their order.

    What a unit contributes depends on its own values, its weight and public constants alone, and
    its integer norm is at most ``grid.sensitivity_units``: that bound is checked on the integers.
    Memory is a fixed number of vectors, whatever the cohort. Not safe for use by two threads.

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
        if not 0 < grid.clip_units / clip_norm < math.inf:
            raise ValueError(f"clip_norm={clip_norm!r} must be within float64's range of units")
        if (grid.rounding is Rounding.DITHERED) != (dither_seed is not None):
            raise ValueError(
                f"dither_seed={dither_seed!r} must be given for rounding=dithered and only then, "
                f"rounding={grid.rounding}"
            )
        self._grid = grid
        self._clip_norm = float(clip_norm)
        self._dither = None if dither_seed is None else dither(dither_seed, grid.dimension)
        self._total = np.zeros(grid.width, np.int64)
        # A float32 sum of integers is exact below 2^24; it is emptied into the total before that.
        self._pending: NDArray[np.float32] | None = None
        self._pending_units = 0
        self._differences: dict[str, kernels.Real] = {}

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
            All zeros when any entry is NaN or infinite.

        Raises
        ------
        ValueError
            When the weight is out of range or the arrays do not fit the grid.
        """
        vector = np.zeros(self._grid.width, np.int64)

        def put(where: slice, integers: kernels.Real) -> None:
            np.copyto(vector[where], integers, casting="unsafe")

        def take_back(where: slice, _: kernels.Real) -> None:
            vector[where] = 0

        indicator = self._place(values, reference, weight, put, take_back)
        if self._grid.indicator_units:
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

        def put(where: slice, integers: kernels.Real) -> None:
            if integers.dtype == np.float32:
                pending = self._pending_sum()[where]
                np.add(pending, integers, out=pending)
            else:
                self._total[where] += integers.astype(np.int64)

        def take_back(where: slice, integers: kernels.Real) -> None:
            put(where, np.negative(integers, out=integers))

        self._make_room()
        indicator = self._place(values, reference, weight, put, take_back)
        self._pending_units += 1
        if self._grid.indicator_units:
            self._total[-1] += indicator

    def _place(
        self,
        values: Sequence[Array],
        reference: Sequence[Array] | None,
        weight: float,
        put: Callable[[slice, kernels.Real], None],
        take_back: Callable[[slice, kernels.Real], None],
    ) -> int:
        """Put one unit's integers where they belong, and return its indicator.

        Blocks are put as they are rounded, before the bound is known; integers add without error,
        so that taking them back leaves no trace.
        """
        if not (_is_number(weight) and 0 <= weight <= 1):
            raise ValueError(f"weight={weight!r} must be in [0, 1]")
        flat = self._flat(values)
        flat_reference = None if reference is None else self._flat(reference)
        if flat_reference is not None:
            sizes, others = [v.size for v in flat], [r.size for r in flat_reference]
            if sizes != others:
                raise ValueError(f"reference has sizes {others}, must be {sizes}")
        with np.errstate(all="ignore"):  # overflow and NaN have a defined outcome
            difference, length = self._difference(flat, flat_reference)
            if not math.isfinite(length):
                return 0
            factor = self._factor(weight, length)
            if difference.dtype == np.float32 and factor > 0:
                if _NORMAL_FLOAT32[0] < factor < _NORMAL_FLOAT32[1]:
                    factor = _float32_at_most(factor)
                else:
                    difference = difference.astype(np.float64)
            if not self._fit(difference, factor, put, take_back):
                return 0
        indicator = self._grid.indicator_units
        return indicator if weight * length <= self._clip_norm else -indicator

    def _fit(
        self,
        difference: kernels.Real,
        factor: float,
        put: Callable[[slice, kernels.Real], None],
        take_back: Callable[[slice, kernels.Real], None],
    ) -> bool:
        """Round and put, shrinking until the integers are within the bound; False: nothing put."""
        grid = self._grid
        scratch = np.empty(min(kernels.BLOCK, difference.size), difference.dtype)

        def pass_over(
            act: Callable[[slice, kernels.Real], None] | None, check: kernels.NormCheck | None
        ) -> None:
            for where, integers in kernels.rounded(difference, factor, self._dither, scratch):
                if check is not None:
                    check.see(integers)
                if act is not None:
                    act(where, integers)

        for _ in range(_ATTEMPTS):
            check = kernels.NormCheck(grid.sensitivity_units, grid.norm)
            pass_over(put, check)
            if not check.within and not check.conclusive:
                check = kernels.NormCheck(grid.sensitivity_units, grid.norm, exact=True)
                pass_over(None, check)
            if check.within:
                return True
            pass_over(take_back, None)
            factor = factor / check.excess * (1 - 2.0**-10)
            if difference.dtype == np.float32:
                factor = _float32_at_most(factor)
        return False

    def _factor(self, weight: float, length: float) -> float:
        """Return what turns the difference into grid units, weighted and clipped."""
        clip_units = self._grid.clip_units
        if weight * length <= self._clip_norm:
            return weight * (clip_units / self._clip_norm)
        return clip_units / length

    def _difference(
        self,
        values: Sequence[NDArray[np.generic]],
        reference: Sequence[NDArray[np.generic]] | None,
    ) -> tuple[kernels.Real, float]:
        """Return ``values - reference`` as one vector and its norm, NaN or inf included."""
        grid = self._grid
        wide = grid.sensitivity_units > _LARGEST_FLOAT32_BOUND or any(
            array.dtype == np.float64 for array in (*values, *(reference or ()))
        )
        dtype = "float64" if wide else "float32"
        if dtype not in self._differences:
            self._differences[dtype] = np.empty(grid.dimension, dtype)
        out = self._differences[dtype]
        if wide:
            for _ in kernels.subtract(values, reference, out):
                pass
            return out, clipping.norm([out], grid.norm)
        scratch = np.empty(min(kernels.BLOCK, out.size))
        total = 0.0
        for block in kernels.subtract(values, reference, out):
            total += kernels.measure(block, grid.norm, scratch)
        return out, math.sqrt(total) if grid.norm is Norm.L2 else total

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

    def _pending_sum(self) -> NDArray[np.float32]:
        if self._pending is None:
            self._pending = np.zeros(self._grid.dimension, np.float32)
        return self._pending

    def _make_room(self) -> None:
        # No entry exceeds the bound once checked; before, clipped, it may by its rounding.
        most = self._grid.sensitivity_units + 2
        if (self._pending_units + 1) * most > _EXACT_FLOAT32:
            self._flush()

    def _flush(self) -> None:
        if self._pending is not None and self._pending_units:
            for where in kernels.blocks(self._grid.dimension):
                self._total[where] += self._pending[where].astype(np.int64)
            self._pending.fill(0)
        self._pending_units = 0


def _float32_at_most(factor: float) -> float:
    """Return the largest float32 that is not above ``factor``."""
    nearest = np.float32(factor)
    return float(nearest if nearest <= factor else np.nextafter(nearest, np.float32(0)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
