"""What went into each layer and what comes back to it, seen by hooks.

>>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
>>> with Capture(model) as capture:
...     parts = capture.backward(lambda: model(torch.ones(5, 2))[:, 0], records=5)
>>> [part.parameters[0] is layer.weight for part, layer in zip(parts, (model[2], model[0]))]
[True, True]
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_sample.contributions import Contribution
from dpfl_flower.client.per_sample.layers import contributions, least_dimensions, owners


class Capture:
    """Hooks on the layers of a model that hold trainable parameters.

    Each layer's contributions are computed as soon as its gradient arrives in the backward pass, so
    that no more inputs and gradients are held than the contributions need. No weight's gradient
    over the batch is computed: autograd is asked for the outputs of the first layers only, and
    every other layer lies on the way there. A linear layer on vectors needs just its inputs and
    gradients, so autograd is asked for these too: a hook takes longer than a small layer.

    Parameters
    ----------
    model : nn.Module
        One in which `unsupported` names no layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = list(owners(model).values())
        self._handles = [
            module.register_forward_hook(self._forward, with_kwargs=True) for module in self._owners
        ]
        self._called: set[nn.Module] = set()
        self._least = {module: least_dimensions(module) for module in self._owners}
        self._records = 0
        self._first: list[GradientEdge] = []
        self._asked: list[tuple[nn.Module, Tensor, int, GradientEdge]] = []
        self._found: list[Contribution] = []
        self._active = False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off."""
        self.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def backward(self, losses: Callable[[], Tensor], *, records: int) -> list[Contribution]:
        """Return the contributions of the records to the sum of what ``losses()`` returns.

        A layer that was used twice contributes twice.

        Raises
        ------
        ModelRefused
            If what a layer gets does not count the records in its first dimension, or is changed
            in place after the layer has used it, or if the parameters of a layer that was not
            called are used nevertheless.
        """
        self._records, self._active = records, True
        try:
            of_records = losses()
            asked, unseen = tuple(self._asked), self._unseen()
            wanted = [one[3] for one in asked]
            wanted += [*self._first, *map(get_gradient_edge, unseen)]
            if wanted and of_records.requires_grad:
                each = torch.ones_like(of_records)  # the gradient of the sum, which needs no sum
                gradients = torch.autograd.grad(of_records, wanted, each, allow_unused=True)
                for p, gradient in zip(unseen, gradients[len(wanted) - len(unseen) :], strict=True):
                    if gradient is not None:
                        raise ModelRefused(
                            f"a parameter of shape {tuple(p.shape)} is used outside the forward of "
                            "its own module, where no hook sees it"
                        )
                for i in reversed(range(len(asked))):  # as the backward pass went
                    if (gradient := gradients[i]) is not None:
                        module, inputs, version, _ = asked[i]
                        self.arrived(module, inputs, version, gradient)
            return self._found
        finally:
            self._first, self._asked, self._found, self._active = [], [], [], False
            self._called.clear()

    def _unseen(self) -> list[nn.Parameter]:
        if len(self._called) == len(self._owners):
            return []
        seen = {p for module in self._called for p in module.parameters(recurse=False)}
        return [
            p
            for module in self._owners
            for p in module.parameters(recurse=False)
            if p.requires_grad and p not in seen
        ]

    def _forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._active:
            return
        self._called.add(module)
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        inputs = args[0] if args else kwargs.get("input")
        if len(args) + len(kwargs) != 1 or not isinstance(inputs, Tensor):
            raise ModelRefused(f"{type(module).__name__} is called with more than its input")
        if type(module) is nn.Linear and inputs.dim() == 2:
            edge = get_gradient_edge(output)
            self._asked.append((module, inputs.detach(), inputs._version, edge))
            return
        if not inputs.requires_grad:
            self._first.append(get_gradient_edge(output))
        output.register_hook(_Arrival(self, module, inputs))  # type: ignore[no-untyped-call]

    def arrived(
        self, module: nn.Module, inputs: Tensor | None, version: int, gradients: Tensor
    ) -> None:
        """Take the gradient in a layer's output, and what it got, of this version."""
        if inputs is None or inputs._version != version:
            raise ModelRefused(f"what {type(module).__name__} got was changed in place afterwards")
        shapes = (inputs.shape, gradients.shape)
        if len(shapes[0]) < self._least[module] or not (
            shapes[0][0] == shapes[1][0] == self._records
        ):
            raise ModelRefused(
                f"{type(module).__name__} gets and returns tensors of shapes "
                f"{tuple(shapes[0])} and {tuple(shapes[1])} for {self._records} records: their "
                "first dimension must count the records"
            )
        self._found += contributions(module, inputs, gradients)


class _Arrival:
    """Keeps a layer's input until its output's gradient arrives."""

    def __init__(self, capture: Capture, module: nn.Module, inputs: Tensor) -> None:
        self._capture, self._module = capture, module
        self._inputs: Tensor | None = inputs.detach()
        self._version = inputs._version

    def __call__(self, gradients: Tensor) -> None:
        inputs, self._inputs = self._inputs, None
        self._capture.arrived(self._module, inputs, self._version, gradients)
