"""Where the hidden units of a ``torch.nn.Sequential`` lie among its arrays.

>>> from torch import nn
>>> for layer in hidden_layers(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))):
...     print([(axis.array, axis.axis) for axis in layer.axes])
[('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, cast, final

from torch import nn

from dpfl_flower import checks

__all__ = ["Axis", "HiddenLayer", "hidden_layers", "resized"]

_ELEMENTWISE: Final = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
)
_PER_CHANNEL: Final = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout2d)


class Sized(Protocol):
    """An array or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@final
@dataclass(frozen=True)
class Axis:
    """One axis of one array, along which the units of a hidden layer lie.

    Attributes
    ----------
    array : str
        The array's name.
    axis : int
        From 0.
    block : int
        How many consecutive entries belong to one unit: 1, or height times width where the channels
        of a convolution are flattened.
    """

    array: str
    axis: int
    block: int = 1

    def __post_init__(self) -> None:
        checks.non_negative_int(axis=self.axis)
        checks.positive_int(block=self.block)


@final
@dataclass(frozen=True)
class HiddenLayer:
    """The units of one hidden layer: every axis of every array that they lie along."""

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        if not self.axes:
            raise ValueError("axes=() must name at least one axis")

    def units(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many units there are; ValueError where the axes do not agree on it."""
        found = set()
        for axis in self.axes:
            shape = shapes.get(axis.array)
            if shape is None:
                raise ValueError(f"{axis!r} must name one of the model's arrays, {sorted(shapes)}")
            if axis.axis >= len(shape) or shape[axis.axis] % axis.block:
                raise ValueError(f"{axis!r} must fit the array's shape, {shape}")
            found.add(shape[axis.axis] // axis.block)
        if len(found) != 1:
            raise ValueError(f"{self!r} must have one number of units along all axes, not {found}")
        return found.pop()


def hidden_layers(model: nn.Module) -> tuple[HiddenLayer, ...]:
    """Return the hidden layers between the linear and convolutional layers of ``model``.

    Parameters
    ----------
    model : nn.Sequential
        Of ``Linear``, ``Conv2d`` without groups, elementwise activations, pooling over space, and
        ``Flatten`` of everything but the batch.

    Raises
    ------
    ValueError
        For any other module: normalisation mixes units, and weights that are shared have several
        places. Name the layers yourself where a sub-model of such a model makes sense.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"model of type {type(model).__name__} must be a Sequential")
    if len(list(model.named_children())) != len(model):
        raise ValueError("model must not hold a module twice: its units would lie in two places")
    found: list[HiddenLayer] = []
    before: nn.Linear | nn.Conv2d | None = None
    before_name, flattened = "", False
    for name, module in model.named_children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if before is not None:
                block = _inputs_per_unit(name, module, before, flattened=flattened)
                outputs = [
                    Axis(f"{before_name}.{part}", 0) for part, _ in before.named_parameters()
                ]
                found.append(HiddenLayer((*outputs, Axis(f"{name}.weight", 1, block=block))))
            before, before_name, flattened = module, name, False
        elif isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1):
                raise ValueError(f"module {name!r} must flatten everything but the batch")
            flattened = True
        elif not isinstance(module, (*_ELEMENTWISE, *_PER_CHANNEL)):
            raise ValueError(
                f"module {name!r} of type {type(module).__name__} must be Linear, Conv2d, Flatten, "
                "an elementwise activation or pooling over space"
            )
    if not found:
        raise ValueError("model must have a hidden layer between two Linear or Conv2d modules")
    return tuple(found)


def resized(model: nn.Module, arrays: Mapping[str, Sized]) -> nn.Module:
    """Return ``model`` with its Linear and Conv2d modules as large as ``arrays`` says.

    A node of federated dropout calls it on a fresh model before it loads the arrays it was sent.

    Parameters
    ----------
    model : nn.Module
        Changed in place; replaced modules have new weights.
    arrays : mapping of name to array or tensor
        Named as in ``model.state_dict()``; only their shapes count.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Conv2d) or f"{name}.weight" not in arrays:
            continue
        outputs, inputs = arrays[f"{name}.weight"].shape[:2]
        if module.weight.shape[:2] == (outputs, inputs):
            continue
        bias = module.bias is not None
        small: nn.Module
        if isinstance(module, nn.Linear):
            small = nn.Linear(inputs, outputs, bias=bias)
        else:
            small = nn.Conv2d(
                inputs,
                outputs,
                cast("tuple[int, int]", module.kernel_size),
                stride=cast("tuple[int, int]", module.stride),
                padding=cast("str | tuple[int, int]", module.padding),
                dilation=cast("tuple[int, int]", module.dilation),
                padding_mode=module.padding_mode,
                bias=bias,
            )
        model.set_submodule(name, small.to(module.weight))
    return model


def _inputs_per_unit(
    name: str, module: nn.Linear | nn.Conv2d, before: nn.Linear | nn.Conv2d, *, flattened: bool
) -> int:
    """Return how many inputs of ``module`` come from one unit of the layer before it."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"module {name!r} must be a convolution of one group")
    units, inputs = before.weight.shape[0], module.weight.shape[1]
    # Only channels that are flattened give a unit several inputs, which then lie side by side.
    channels = isinstance(before, nn.Conv2d)
    fits = flattened if channels != isinstance(module, nn.Conv2d) else inputs == units
    if not fits or inputs % units or (inputs != units and not channels):
        raise ValueError(
            f"module {name!r} has {inputs} inputs, must take the {units} units of the layer before "
            "it, flattened where those are channels"
        )
    return inputs // units
