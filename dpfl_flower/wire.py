"""Arrays as they travel in Flower messages, read without copying them.

``flwr.app.Array.numpy()`` copies what it reads, twice; for a server that only subtracts and sums,
reading is then a third of the work.

>>> import numpy as np
>>> from flwr.app import Array
>>> read_array(Array(np.array([1.5, 2.5])))
array([1.5, 2.5])
"""

import math
from io import BytesIO

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

__all__ = ["read_array"]

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_STYPE = "numpy.ndarray"


def read_array(array: Array) -> NDArray[np.generic]:
    """Return the array as a read-only view of the message's own bytes.

    Nothing in the bytes is executed: arrays of Python objects are refused.

    Raises
    ------
    ValueError
        When the bytes are no serialized array, too short for it, or hold Python objects.
    TypeError
        When the array is serialized in another way than numpy's.
    """
    if array.stype != _STYPE:
        raise TypeError(f"stype={array.stype!r} must be {_STYPE!r}")
    stream = BytesIO(array.data)  # shares the bytes
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version={version!r} of the array format must be in {list(_HEADERS)}")
    shape, column_major, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"dtype={dtype!r} must not hold Python objects")
    size = math.prod(shape)
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, count=size, offset=stream.tell())
    return flat.reshape(shape, order="F" if column_major else "C")
