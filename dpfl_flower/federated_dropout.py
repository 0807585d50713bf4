"""Federated dropout: each node trains a random smaller model, cut from the global one.

Fewer hidden units travel and are trained (Caldas, Konečný, McMahan and Talwalkar, "Expanding the
Reach of Federated Learning by Reducing Client Resource Requirements", arXiv 1812.07210, section 3).
Which units a node keeps follows from the round's public seed and the node's id, so that what one
node contributes does not depend on which others take part: its update is zero where it kept
nothing, and clipping bounds it as any other.

>>> import numpy as np
>>> from dpfl_flower.hidden_layers import Axis, HiddenLayer
>>> model = {
...     "in.weight": np.zeros((4, 2), np.float32), "in.bias": np.zeros(4, np.float32),
...     "out.weight": np.zeros((1, 4), np.float32),
... }
>>> hidden = HiddenLayer((Axis("in.weight", 0), Axis("in.bias", 0), Axis("out.weight", 1)))
>>> half = FederatedDropout(rate=0.5, layers=(hidden,))
>>> cut = half.submodel(model, seed=b"round 1", node_id=7)
>>> {name: array.shape for name, array in cut.take(model).items()}
{'in.weight': (2, 2), 'in.bias': (2,), 'out.weight': (1, 2)}
>>> half.keep_probability(ArrayLayout.of(model))
array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5,
       0.5, 0.5, 0.5])
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.layout import Array, ArrayLayout, as_numpy
from dpfl_flower.rng import SeededRandom

if TYPE_CHECKING:
    from torch import nn

    from dpfl_flower.hidden_layers import HiddenLayer

__all__ = ["FederatedDropout", "Submodel"]

Arrays = Mapping[str, Array]


@final
@dataclass(frozen=True)
class Submodel:
    """Which entries of the model one node trains.

    Attributes
    ----------
    kept : mapping of array name to one index array (or None, for all) per axis
        Arrays that are trained whole are left out.
    """

    kept: Mapping[str, tuple[NDArray[np.intp] | None, ...]]

    def take(self, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return the model that travels to the node: the kept entries, in their order."""
        return {
            name: np.require(as_numpy(array)[self._where(name, tuple(array.shape))], None, "C")
            for name, array in arrays.items()
        }

    def scatter(self, part: Arrays, template: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return arrays as large as ``template``: ``part`` at the kept entries, zero elsewhere."""
        whole: dict[str, NDArray[np.generic]] = {}
        for name, like in template.items():
            piece = as_numpy(part[name])
            if name not in self.kept:
                whole[name] = piece
                continue
            whole[name] = np.zeros(tuple(like.shape), piece.dtype)
            whole[name][self._where(name, tuple(like.shape))] = piece
        return whole

    def _where(self, name: str, shape: tuple[int, ...]) -> Any:
        kept = self.kept.get(name)
        if kept is None:
            return ...
        axes = zip(kept, shape, strict=True)
        return np.ix_(*(np.arange(n) if index is None else index for index, n in axes))


@final
@dataclass(frozen=True)
class FederatedDropout:
    """The share of each hidden layer's units that a node leaves out, and where they lie.

    Parameters
    ----------
    rate : float
        In [0, 1): of n units a node keeps ``max(1, round((1 - rate) n))``.
    layers : tuple of HiddenLayer
        Never the inputs or the outputs of the model. See :meth:`of` for a ``Sequential``.

    Raises
    ------
    ValueError
        Naming the argument, its value and the bound.
    """

    rate: float
    layers: "tuple[HiddenLayer, ...]"

    def __post_init__(self) -> None:
        checks.non_negative(rate=self.rate)
        if self.rate >= 1:
            raise ValueError(f"rate={self.rate!r} must be in [0, 1)")
        if not self.layers:
            raise ValueError("layers=() must name at least one hidden layer")
        axes = [(axis.array, axis.axis) for layer in self.layers for axis in layer.axes]
        for axis in axes:
            if axes.count(axis) > 1:
                raise ValueError(f"layers must name axis {axis!r} once")

    @classmethod
    def of(cls, model: "nn.Module", *, rate: float) -> Self:
        """Find the hidden layers of a ``torch.nn.Sequential``.

        Raises
        ------
        ValueError
            Where it holds a module whose units cannot be told: give ``layers`` then.
        """
        # Imports torch, as only who has a torch model needs it.
        from dpfl_flower.hidden_layers import hidden_layers  # noqa: PLC0415

        return cls(rate=rate, layers=hidden_layers(model))

    def check(self, arrays: Arrays) -> None:
        """Raise ValueError unless every layer fits the model's ``arrays``."""
        shapes = _shapes(arrays)
        for layer in self.layers:
            layer.units(shapes)

    def submodel(self, arrays: Arrays, *, seed: bytes, node_id: int) -> Submodel:
        """Return what one node trains in a round.

        Parameters
        ----------
        arrays : mapping of name to array
            The global model, of which only shapes count.
        seed : bytes
            The round's public seed.
        node_id : int
            The node's id: every node keeps units of its own.
        """
        shapes = _shapes(arrays)
        kept: dict[str, list[NDArray[np.intp] | None]] = {}
        for index, layer in enumerate(self.layers):
            n = layer.units(shapes)
            units = _draw(n, self._kept(n), seed=seed, node_id=node_id, layer=index)
            for axis in layer.axes:
                entries = units[:, None] * axis.block + np.arange(axis.block)
                of_array = kept.setdefault(axis.array, [None] * len(shapes[axis.array]))
                of_array[axis.axis] = entries.reshape(-1)
        return Submodel({name: tuple(indices) for name, indices in kept.items()})

    def keep_probability(self, layout: ArrayLayout) -> NDArray[np.float64]:
        """Return how likely a node is to train each released entry, shape ``(dimension,)``.

        A public constant: the mean over the expected cohort is divided by it.
        """
        shapes = {spec.name: spec.shape for spec in layout.arrays}
        of_array = dict.fromkeys(shapes, 1.0)
        for layer in self.layers:
            n = layer.units(shapes)
            for axis in layer.axes:
                of_array[axis.array] *= self._kept(n) / n
        released = (spec for spec in layout.arrays if spec.floating)
        return np.concatenate([np.full(math.prod(s.shape), of_array[s.name]) for s in released])

    def _kept(self, units: int) -> int:
        return max(1, round((1 - self.rate) * units))


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _draw(n: int, k: int, *, seed: bytes, node_id: int, layer: int) -> NDArray[np.intp]:
    """Return ``k`` of ``n`` units, sorted, by public randomness."""
    label = f"dpfl-flower federated dropout\0{node_id}\0{layer}\0".encode()
    digest = hashlib.sha256(label + seed).digest()
    units = SeededRandom(int.from_bytes(digest, "big")).sample(range(n), k)
    return np.array(sorted(units), np.intp)
