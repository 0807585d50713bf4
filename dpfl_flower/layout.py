"""What a model's arrays look like: which are released and which stay at the server.

Floating arrays are concatenated, in order, into one vector of length ``dimension``; that vector is
what gets clipped, summed and noised. Integer and boolean arrays (``num_batches_tracked`` and the
like) are never released: the server keeps its own.

>>> import numpy as np
>>> model = {"weight": np.zeros((2, 3), np.float32), "steps": np.array(7), "bias": np.array(0.5)}
>>> layout = ArrayLayout.of(model)
>>> layout.dimension, layout.released_names
(7, ('weight', 'bias'))
>>> new = layout.restore(np.arange(7.0), template=model)
>>> new["bias"], new["steps"]
(array(6.), array(7))
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

__all__ = ["Array", "ArrayLayout", "ArraySpec", "as_numpy", "is_floating"]

Array: TypeAlias = "NDArray[np.generic] | torch.Tensor"
"""What one array may be: a numpy array of any layout in memory, or a torch tensor anywhere."""

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_FLOATING_TYPES = frozenset({np.float16, np.float32, np.float64})


def _is_tensor(array: Any) -> "TypeIs[torch.Tensor]":
    """Whether the array is torch's, without importing torch, which takes longer than all else."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_name(array: Array) -> str:
    """Return the plain name of an array's dtype, the same for numpy and torch: ``"float32"``."""
    if _is_tensor(array):
        return str(array.dtype).removeprefix("torch.")
    return _native_name(array.dtype)


@cache
def _native_name(dtype: np.dtype[Any]) -> str:
    return str(np.dtype(dtype.type))


def is_floating(array: Array) -> bool:
    """Whether the array is float16, bfloat16, float32 or float64: whether it is released."""
    if _is_tensor(array):
        return dtype_name(array) in _FLOATING
    return array.dtype.type in _FLOATING_TYPES


def as_numpy(array: Array) -> NDArray[np.generic]:
    """Return the array as numpy without copying where possible; bfloat16 widens to float32."""
    if _is_tensor(array):
        array = array.detach().cpu()
        return (array.float() if dtype_name(array) == "bfloat16" else array).numpy()
    return np.asarray(array)


@dataclass(frozen=True)
class ArraySpec:
    """The name, shape and dtype of one array."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, array: Array) -> "ArraySpec":
        """Describe ``array``; ValueError unless it is a floating, integer or boolean array."""
        dtype = dtype_name(array)
        if dtype not in _FLOATING and not dtype.startswith(("int", "uint", "bool")):
            raise ValueError(
                f"array {name!r} has dtype {dtype}, must be one of {', '.join(_FLOATING)}, "
                "an integer or a boolean"
            )
        return cls(name, tuple(array.shape), dtype)

    @property
    def floating(self) -> bool:
        """Whether the array is released."""
        return self.dtype in _FLOATING

    @property
    def size(self) -> int:
        """How many entries the array has; 1 for a 0-d array."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ArrayLayout:
    """Names, shapes and dtypes of a model's arrays, in order.

    Attributes
    ----------
    arrays : tuple of ArraySpec

    Raises
    ------
    ValueError
        When no array is floating or all floating arrays are empty: there is nothing to release.
    """

    arrays: tuple[ArraySpec, ...]

    def __post_init__(self) -> None:
        if self.dimension == 0:
            names = [spec.name for spec in self.arrays]
            raise ValueError(
                f"empty model: arrays={names!r} must include at least one non-empty floating array"
            )

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> "ArrayLayout":
        """Describe ``arrays``; ValueError when none is floating or one has an unknown dtype."""
        return cls(tuple(ArraySpec.of(name, array) for name, array in arrays.items()))

    @property
    def dimension(self) -> int:
        """How many entries are released; a 0-d array counts 1."""
        return sum(spec.size for spec in self.arrays if spec.floating)

    @property
    def released_names(self) -> tuple[str, ...]:
        """Names of the floating arrays, in order."""
        return tuple(spec.name for spec in self.arrays if spec.floating)

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raise ValueError unless ``arrays`` has this layout, in any order of its keys.

        Floating dtypes are interchangeable, and so are integer and boolean ones; the error names
        the array that does not fit, what was found and what was expected.
        """
        expected = {spec.name for spec in self.arrays}
        missing, extra = expected - arrays.keys(), arrays.keys() - expected
        if missing or extra:
            raise ValueError(f"arrays are missing {sorted(missing)} and have extra {sorted(extra)}")
        for spec in self.arrays:
            found = ArraySpec.of(spec.name, arrays[spec.name])
            if found.shape != spec.shape:
                raise ValueError(
                    f"array {spec.name!r} has shape {found.shape}, must be {spec.shape}"
                )
            if found.floating != spec.floating:
                kind = "a floating dtype" if spec.floating else "an integer or boolean dtype"
                raise ValueError(f"array {spec.name!r} has dtype {found.dtype}, must be {kind}")

    def released(self, arrays: Mapping[str, Array]) -> list[Array]:
        """Return the floating arrays in this layout's order, after :meth:`check`."""
        self.check(arrays)
        return [arrays[name] for name in self.released_names]

    def flatten(self, arrays: Mapping[str, Array]) -> NDArray[np.float64]:
        """Concatenate the floating arrays into a new float64 vector of length ``dimension``."""
        vector = np.empty(self.dimension)
        start = 0
        for array in self.released(arrays):
            flat = as_numpy(array).reshape(-1)
            vector[start : start + flat.size] = flat
            start += flat.size
        return vector

    def restore(
        self, vector: NDArray[np.float64], template: Mapping[str, Array]
    ) -> dict[str, NDArray[np.generic]]:
        """Turn a vector back into named arrays.

        Parameters
        ----------
        vector : float64 array, shape (dimension,)
        template : mapping of name to array
            Supplies the dtypes of the floating arrays and the values of all others.

        Returns
        -------
        dict of name to array
            New arrays in this layout's order: floating ones from ``vector`` in their own dtype,
            saturated at the dtype's range (bfloat16, which numpy lacks, as float32); the rest
            copied from ``template``.

        Raises
        ------
        ValueError
            When the vector's shape or the template does not fit.
        """
        if vector.shape != (self.dimension,):
            raise ValueError(f"vector has shape {vector.shape}, must be {(self.dimension,)}")
        self.check(template)
        restored: dict[str, NDArray[np.generic]] = {}
        start = 0
        for spec in self.arrays:
            like = as_numpy(template[spec.name])
            if not spec.floating:
                restored[spec.name] = like.copy()
                continue
            values = vector[start : start + spec.size].reshape(spec.shape)
            limit = float(np.finfo(like.dtype.name).max)
            restored[spec.name] = np.asarray(np.clip(values, -limit, limit), like.dtype)
            start += spec.size
        return restored
