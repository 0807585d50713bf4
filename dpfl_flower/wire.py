"""What travels in Flower messages, read without copying it.

``flwr.app.Array.numpy()`` copies what it reads, twice; for a server that only subtracts and sums,
reading is then a third of the work.

>>> import numpy as np
>>> from flwr.app import Array
>>> read_array(Array(np.array([1.5, 2.5])))
array([1.5, 2.5])
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from dpfl_flower import records

__all__ = [
    "answered_arrays",
    "answered_metrics",
    "array_record",
    "config_record",
    "num_examples",
    "read_array",
    "write_array",
]

_STYPE = "numpy.ndarray"
_VERSIONS = {(1, 0): (2, npy.read_array_header_1_0), (2, 0): (4, npy.read_array_header_2_0)}
_LONGEST_HEADER = 10_000


def config_record(content: RecordDict, name: str) -> ConfigRecord | None:
    """Return ``content.config_records.get(name)`` without writing every record anew.

    >>> config_record(RecordDict({"config": ConfigRecord({"lr": 0.1})}), "config")["lr"]
    0.1
    """
    found = content.get(name)
    return found if isinstance(found, ConfigRecord) else None


def array_record(content: RecordDict, name: str) -> ArrayRecord:
    """Return ``content.array_records[name]`` without writing every record anew; KeyError if none.

    >>> array_record(RecordDict({"config": ConfigRecord()}), "config")
    Traceback (most recent call last):
        ...
    KeyError: 'config'
    """
    found = content.get(name)
    if not isinstance(found, ArrayRecord):
        raise KeyError(name)
    return found


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[np.generic]


@lru_cache(maxsize=1024)  # a model's arrays have the same headers in every reply
def _parsed(start: bytes) -> _Header:
    stream = BytesIO(start)
    version = npy.read_magic(stream)
    shape, column_major, dtype = _VERSIONS[version][1](stream, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject:
        raise ValueError(f"dtype={dtype!r} must not hold Python objects")
    return _Header(shape, "F" if column_major else "C", dtype)


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
    data = array.data
    version = npy.read_magic(BytesIO(data[: npy.MAGIC_LEN]))
    if version not in _VERSIONS:
        raise ValueError(f"version={version!r} of the array format must be in {list(_VERSIONS)}")
    body = npy.MAGIC_LEN + _VERSIONS[version][0]
    body += int.from_bytes(data[npy.MAGIC_LEN : body], "little")
    if body > _LONGEST_HEADER:
        raise ValueError(f"header of {body} bytes must be <= {_LONGEST_HEADER}")
    header = _parsed(data[:body])
    size = math.prod(header.shape)
    if size == 0:
        return np.empty(header.shape, header.dtype)
    flat = np.frombuffer(data, header.dtype, count=size, offset=body)
    return flat.reshape(header.shape, order=header.order)


@lru_cache(maxsize=1024)
def _written(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> tuple[bytes, str]:
    """Return what is written before a row-major array, and its type's name."""
    if dtype.hasobject:
        raise ValueError(f"dtype={dtype!r} must not hold Python objects")
    stream = BytesIO()
    npy.write_array_header_1_0(
        stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return stream.getvalue(), str(dtype)


def write_array(array: NDArray[np.generic]) -> Array:
    """Return ``Array(array)``, copied once instead of four times, and row-major in any case.

    >>> import numpy as np
    >>> write_array(np.arange(3)).data == Array(np.arange(3)).data
    True
    """
    rows = np.asarray(array, order="C")
    header, name = _written(rows.dtype, rows.shape)
    data = b"".join((header, rows.data))
    return Array(dtype=name, shape=rows.shape, stype=_STYPE, data=data)


def answered_arrays(content: RecordDict) -> dict[str, NDArray[np.generic]]:
    """Return the arrays a ClientApp answers: those named ``arrays``, or the only ones there are.

    Raises
    ------
    ValueError, TypeError
        If there are no arrays, several of another name, or some that cannot be read.
    """
    named = content.get(records.ARRAYS)
    record = named if isinstance(named, ArrayRecord) else _only(content)
    return {name: read_array(array) for name, array in record.items()}


def _only(content: RecordDict) -> ArrayRecord:
    found = [record for record in content.values() if isinstance(record, ArrayRecord)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} array records, expected 1")
    return found[0]


def answered_metrics(content: RecordDict) -> MetricRecord:
    """Return the metrics named ``metrics``, or the only ones there are, else an empty record."""
    named = content.get(records.METRICS)
    if isinstance(named, MetricRecord):
        return named
    found = [record for record in content.values() if isinstance(record, MetricRecord)]
    return found[0] if len(found) == 1 else MetricRecord()


def num_examples(metrics: MetricRecord) -> float:
    """Return the reported number of examples, NaN where there is none or it is no number."""
    value = metrics.get(records.NUM_EXAMPLES)
    return float(value) if isinstance(value, int | float) else math.nan
