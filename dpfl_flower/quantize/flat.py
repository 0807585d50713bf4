"""A unit's released arrays as flat vectors.

>>> [vector.shape for vector in flat_arrays([np.zeros((2, 3)), np.array(1.0)], 7)]
[(6,), (1,)]
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.layout import Array, as_numpy, dtype_name, is_floating

__all__ = ["flat_arrays", "np"]


def flat_arrays(arrays: Sequence[Array], dimension: int) -> list[NDArray[np.generic]]:
    """Return each array as a vector of its own dtype; ``dimension`` entries in all.

    Raises
    ------
    ValueError
        Where an array is not floating, or there are more or fewer entries.
    """
    for index, array in enumerate(arrays):
        if not is_floating(array):
            raise ValueError(
                f"array {index} has dtype {dtype_name(array)}, must be floating: "
                "integer and boolean arrays are never released"
            )
    flat = [as_numpy(array).reshape(-1) for array in arrays]
    size = sum(array.size for array in flat)
    if size != dimension:
        raise ValueError(f"arrays have {size} entries, must be {dimension}")
    return flat
