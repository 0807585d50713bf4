"""Block-wise arithmetic on one unit's update: difference, norm, scaling and rounding.

The arithmetic that defines a contribution, entry by entry and reproducible anywhere: the difference
``values - reference``, the product with one factor and the sum with the dither are each rounded
once, in float32 (in float64 where an input is float64, or where float32 would not resolve the
grid); then comes the floor, or the nearest integer, ties to even. Norms are sums in float64.
Blocks are small enough to stay in a core's cache from one step to the next.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.clipping import Norm

__all__ = ["BLOCK", "NormCheck", "Real", "blocks", "measure", "rounded", "subtract"]

Real = NDArray[np.float32] | NDArray[np.float64]

BLOCK = 1 << 16
_ROW = 512
_ROW_ERROR = 2.0**-14
"""Above ``n u / (1 - n u)`` for n = 512 products and u = 2^-24, in whatever order they are summed
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., equation 3.5), twice over."""


def blocks(size: int) -> Iterator[slice]:
    """Yield slices that cover ``range(size)`` in order."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def subtract(
    values: Sequence[NDArray[np.generic]],
    reference: Sequence[NDArray[np.generic]] | None,
    out: Real,
) -> Iterator[Real]:
    """Write ``values - reference``, concatenated, into ``out``; yield each block once it is there.

    Parameters
    ----------
    values, reference : sequences of 1-d floating arrays of equal sizes
    out : float32 or float64 array, as long as all of them
        Its dtype is the dtype of the difference.
    """
    filled = yielded = 0
    for index, value in enumerate(values):
        start = 0
        while start < value.size:
            take = min(value.size - start, BLOCK - filled % BLOCK)
            part, target = value[start : start + take], out[filled : filled + take]
            if reference is None:
                np.copyto(target, part, casting="same_kind")
            else:
                other = reference[index][start : start + take]
                np.subtract(part, other, out=target, dtype=out.dtype, casting="same_kind")
            start += take
            filled += take
            if filled % BLOCK == 0:
                yield out[yielded:filled]
                yielded = filled
    if yielded < filled:
        yield out[yielded:filled]


def measure(block: Real, norm: Norm, scratch: NDArray[np.float64]) -> float:
    """Return the sum of squares (L2) or of absolute values (L1) of a block, in float64.

    Exact where all entries are integers and the sum stays below 2^53.
    """
    wide = scratch[: block.size]
    if norm is Norm.L1:
        return float(np.abs(block, out=wide).sum())
    np.copyto(wide, block)
    return _dots(wide, 4096)


def _dots(block: Real, row: int) -> float:
    """Return the sum of squares: a dot product per row, the rows summed in float64."""
    whole = block.size - block.size % row
    rows = block[:whole].reshape(-1, row)
    total = np.matmul(rows[:, None, :], rows[:, :, None]).sum(dtype=np.float64)
    rest = block[whole:]
    return float(total) + float(rest @ rest)


def rounded(
    difference: Real, factor: float, dither: NDArray[np.float32] | None, scratch: Real
) -> Iterator[tuple[slice, Real]]:
    """Yield (where, integers) block by block: ``floor(difference * factor + dither)``.

    Nearest, ties to even, without a dither. The integers are floats in ``scratch``, overwritten by
    the next block.
    """
    scale = difference.dtype.type(factor)
    for where in blocks(difference.size):
        block = difference[where]
        integers = scratch[: block.size]
        np.multiply(block, scale, out=integers)
        if dither is None:
            np.rint(integers, out=integers)
        else:
            np.add(integers, dither[where], out=integers)
            np.floor(integers, out=integers)
        yield where, integers


class NormCheck:
    """Whether the integers seen so far are within the bound: never yes by mistake.

    Quick on float32: squares are summed in float32 over rows of 512, the rows in float64, and the
    bound on the rounding error is added. ``within`` is then sound but may be a false alarm;
    ``exact=True`` sums without any error, and so does a float64 block.
    """

    def __init__(self, bound: int, norm: Norm, *, exact: bool = False) -> None:
        self._limit = float(bound if norm is Norm.L1 else bound * bound)
        self._norm = norm
        self._exact = exact
        self._sum = 0.0
        self._error = 0.0
        self._scratch = np.empty(BLOCK)

    def see(self, integers: Real) -> None:
        """Take the next block of integers into account."""
        if self._exact or self._norm is Norm.L1 or integers.dtype == np.float64:
            self._sum += measure(integers, self._norm, self._scratch)
        else:
            part = _dots(integers, _ROW)
            self._sum += part
            self._error += part * _ROW_ERROR

    @property
    def within(self) -> bool:
        """Whether the bound holds for certain."""
        return self._sum + self._error <= self._limit

    @property
    def conclusive(self) -> bool:
        """Whether ``within`` is the last word."""
        return self._error == 0 or self._sum - self._error > self._limit

    @property
    def excess(self) -> float:
        """The norm of what was seen, over the bound."""
        ratio = self._sum / self._limit
        return ratio if self._norm is Norm.L1 else float(ratio**0.5)
