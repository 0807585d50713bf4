"""Two ways to spare a resident model memory traffic: the same mathematics, less to move.

Training many users on a CPU is bound by memory, not by arithmetic. Both ways change only the copy
of the model that stays in this process; names and values of its arrays remain.

>>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
>>> pool_before_relu(model)
>>> [type(layer).__name__ for layer in model]
['Conv2d', 'MaxPool2d', 'ReLU', 'Flatten']
"""

from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any, Final, final

import torch
from torch import Tensor, nn

__all__ = ["FactoredWeights", "pool_before_relu"]

_WORTHWHILE: Final = 1 << 14
"""Entries from which on a weight's gradient costs more than a call from Python."""


def pool_before_relu(model: nn.Module) -> None:
    """Let max pooling come before the ReLU it follows, inside every ``nn.Sequential``.

    ``maxpool(relu(x))`` and ``relu(maxpool(x))`` have the same value and the same gradient, to the
    last bit, ties and NaN included: ReLU never swaps the order of two entries, and where the
    largest of a window is not positive no gradient passes either way. The ReLU then has a quarter
    of the entries, for a window of 2 x 2.
    """
    for sequence in list(model.modules()):
        if type(sequence) is not nn.Sequential:
            continue
        layers = sequence._modules
        names = list(layers)
        for name, after in pairwise(names):
            relu, pool = layers[name], layers[after]
            if (
                type(relu) is nn.ReLU
                and type(pool) is nn.MaxPool2d
                and not pool.return_indices
                and not _is_hooked(relu)
                and not _is_hooked(pool)
            ):
                layers[name], layers[after] = pool, relu


@final
class FactoredWeights:
    """Gradients of large ``nn.Linear`` weights, kept as their two factors until the step.

    The gradient of a weight is a product of two thin matrices, the batch's inputs and the gradients
    of its outputs. Plain SGD can add that product to the weight directly; the gradient, as large
    as the weight, is then never written nor read. A weight that two modules share is left alone;
    one that its module uses several times in a step collects several products.

    Parameters
    ----------
    model : nn.Module
        Its linear layers compute through this object from here on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []
        uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        for module in model.modules():
            if (
                type(module) is nn.Linear
                and module.weight.requires_grad
                and module.weight.numel() >= _WORTHWHILE
                and uses[id(module.weight)] == 1
                and not _is_hooked(module)
            ):
                module.forward = partial(_forward, module, self._factors)  # type: ignore[method-assign]

    def step(self, lr: float) -> None:
        """Take the step of plain SGD along the gradients collected, and forget them."""
        for weight, inputs, gradients in self._factors:
            weight.addmm_(gradients.t(), inputs, alpha=-lr)
        self._factors.clear()

    def forget(self) -> None:
        """Drop what a step that failed has left."""
        self._factors.clear()


def _forward(
    module: nn.Linear, factors: list[tuple[Tensor, Tensor, Tensor]], inputs: Tensor
) -> Tensor:
    outputs: Tensor = _Linear.apply(inputs, module.weight, module.bias, factors)  # type: ignore[no-untyped-call]
    return outputs


class _Linear(torch.autograd.Function):
    """``nn.functional.linear`` whose backward pass leaves the weight's gradient as factors."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.factors = weight.detach(), factors
        ctx.has_bias = bias is not None
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        (gradients,) = grad_outputs
        rows = gradients.reshape(-1, gradients.shape[-1])
        ctx.factors.append((ctx.weight, inputs.detach().reshape(-1, inputs.shape[-1]), rows))
        to_inputs = gradients @ ctx.weight if ctx.needs_input_grad[0] else None
        to_bias = rows.sum(0) if ctx.has_bias else None
        return to_inputs, None, to_bias, None


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
