"""Block-wise arithmetic on one unit's update: difference, norm, scaling and rounding.

The arithmetic that defines a contribution, entry by entry and the same anywhere: the difference
``values - reference``, its product with one factor and the sum with the dither are each rounded
once, in float32 (in float64 where an input is float64, or where float32 would not resolve the
grid); then comes the nearest integer, ties to even. Blocks are small enough to stay in a core's
cache from one step to the next; what numpy needs to know of them is prepared once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.clipping import Norm
from dpfl_flower.quantize.dither import PERIOD

__all__ = ["BLOCK", "Block", "NormCheck", "PowerSum", "Real", "Workspace", "blocks"]

Real = NDArray[np.float32] | NDArray[np.float64]

BLOCK: Final = PERIOD  # so that the same dither fits every block
_ROW: Final = 1024
_ROW_ERROR: Final = 2.0**-13
"""Above ``n u / (1 - n u)`` for n = 1024 products and u = 2^-24, in whatever order they are summed
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., equation 3.5), twice over."""


def blocks(size: int) -> Iterator[slice]:
    """Yield slices that cover ``range(size)`` in order."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


class Block:
    """A stretch of a vector, and the same cut into rows whose squares are summed one by one.

    ``dither`` is as long as ``values``, or None to round to nearest.
    """

    def __init__(self, values: Real, dither: NDArray[np.float32] | None = None) -> None:
        count = values.size // _ROW
        self.values = values
        self.dither = dither
        self.left: NDArray[Any] = values[: count * _ROW].reshape(count, 1, _ROW)
        self.right: NDArray[Any] = values[: count * _ROW].reshape(count, _ROW, 1)
        self.rest = values[count * _ROW :]

    def round(self, factor: np.floating[Any]) -> None:
        """Replace the values by the integers ``rint(values * factor + dither)``."""
        values = self.values
        np.multiply(values, factor, out=values)
        if self.dither is not None:
            np.add(values, self.dither, out=values)
        np.rint(values, out=values)


class PowerSum:
    """Sums the squares (L2) or absolute values (L1) of a vector, block by block, in float64.

    Exact where all entries are integers and the sum is below 2^53. With ``quick`` the squares of
    float32 entries are summed in float32 over rows of 1024, and only the rows in float64:
    ``relative_error`` bounds what that costs as long as no square overflows or vanishes.
    """

    def __init__(self, norm: Norm, size: int, *, quick: bool) -> None:
        self.relative_error = _ROW_ERROR if quick and norm is Norm.L2 else 0.0
        self._norm = norm
        self._quick = quick
        self._rows = np.empty((size // _ROW, 1, 1), np.float32 if quick else np.float64)
        self._seen = 0
        self._rest = 0.0

    def see(self, block: Block) -> None:
        """Take the next block into account."""
        if self._norm is Norm.L1:
            self._rest += float(np.abs(block.values).sum(dtype=np.float64))
            return
        if not self._quick:
            block = Block(block.values.astype(np.float64))
        seen = self._seen + len(block.left)
        np.matmul(block.left, block.right, out=self._rows[self._seen : seen])
        self._seen = seen
        if block.rest.size:
            self._rest += float(block.rest @ block.rest)

    def value(self) -> float:
        """Return the sum over everything seen."""
        return float(self._rows[: self._seen].sum(dtype=np.float64)) + self._rest


class NormCheck:
    """Whether a vector of integers is within the bound: never yes by mistake.

    A quick look first, to which the bound on its error is added; only if that does not tell, the
    sum without any error.

    Parameters
    ----------
    bound : int
        At most 2^26, so that float64 tells its square from every larger integer.
    norm : Norm
    size : int
    quick : bool
        Whether the entries are float32; float64 is summed without error at once.
    """

    def __init__(self, bound: int, norm: Norm, size: int, *, quick: bool) -> None:
        self._norm = norm
        self._size = size
        self._limit = float(bound if norm is Norm.L1 else bound * bound)
        self._sum = PowerSum(norm, size, quick=quick)
        self.see = self._sum.see

    def excess(self, integers: Sequence[Block]) -> float:
        """Return how far the integers, all seen before, exceed the bound, as a ratio of norms.

        Exactly 0 where they are within, above 0 where they are not.
        """
        found, error = self._sum.value(), self._sum.relative_error
        if found * (1 + error) <= self._limit:
            return 0.0
        if error:
            exact = PowerSum(self._norm, self._size, quick=False)
            for block in integers:
                exact.see(block)
            found = exact.value()
        if found <= self._limit:
            return 0.0
        ratio = found / self._limit
        return ratio if self._norm is Norm.L1 else float(ratio**0.5)


class Workspace:
    """The vector that each unit in turn is worked out in, cut into blocks.

    Parameters
    ----------
    dimension : int
    dtype : numpy dtype
        float32 or float64: the arithmetic.
    dither : float32 array, shape (min(dimension, BLOCK),), or None
        The same for every block.
    """

    def __init__(
        self, dimension: int, dtype: np.dtype[Any], dither: NDArray[np.float32] | None
    ) -> None:
        self.values: Real = np.empty(dimension, dtype)
        self.blocks = [
            Block(
                self.values[where], None if dither is None else dither[: where.stop - where.start]
            )
            for where in blocks(dimension)
        ]

    def subtract(
        self,
        values: Sequence[NDArray[np.generic]],
        reference: Sequence[NDArray[np.generic]] | None,
    ) -> Iterator[Block]:
        """Compute ``values - reference``, concatenated; yield each block once it is there.

        Parameters
        ----------
        values, reference : sequences of 1-d floating arrays of equal sizes, ``dimension`` in all
        """
        out = self.values
        ready = iter(self.blocks)
        filled = 0
        for index, value in enumerate(values):
            start = 0
            while start < value.size:
                stop = min(value.size, start + BLOCK - filled % BLOCK)
                target = out[filled : filled + stop - start]
                if reference is None:
                    np.copyto(target, value[start:stop], casting="same_kind")
                else:
                    other = reference[index][start:stop]
                    np.subtract(
                        value[start:stop], other, out=target, dtype=out.dtype, casting="same_kind"
                    )
                filled += stop - start
                start = stop
                if filled % BLOCK == 0 or filled == out.size:
                    yield next(ready)
