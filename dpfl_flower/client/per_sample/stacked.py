"""The clipped sums of many small models of one architecture, each over its own records, at once.

A step of a small model is mostly calls into torch, and one batched matrix product takes no more
calls for thirty models than for one. Norms and sums are those of book-keeping (Bu et al., arXiv
2210.00038, Algorithm 1), with one more dimension in front, for the models.

>>> models = [nn.Sequential(nn.Linear(2, 1)) for _ in range(3)]
>>> example = (torch.zeros(2), torch.zeros(1))
>>> unstackable(models, example) is None
True
>>> clipper = StackedClipper(models, nn.MSELoss(reduction="none"), clip=Clip(1.0))
>>> counted = torch.tensor([[True, True], [True, False], [False, False]])
>>> sums = clipper.clipped_sums([torch.ones(3, 2, 2), torch.ones(3, 2, 1)], counted)
>>> sums.shape, sums[2].tolist()  # two weights and a bias; the third model has no record
(torch.Size([3, 3]), [0.0, 0.0, 0.0])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from dpfl_flower.client.per_sample.clip import Clip
from dpfl_flower.client.per_sample.clipper import Batch, LossFunction, per_example_losses
from dpfl_flower.client.per_sample.layers import contributions

__all__ = ["Clip", "StackedClipper", "nn", "torch", "unstackable"]

_POINTWISE: Final = frozenset(
    {
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.Identity,
        nn.LeakyReLU,
        nn.LogSigmoid,
        nn.Mish,
        nn.ReLU,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softshrink,
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
        nn.Threshold,
    }
)


def unstackable(models: Sequence[nn.Module], example: Sequence[Tensor]) -> str | None:
    """Say why these models cannot be stacked, None where they can.

    They can where each is an ``nn.Sequential`` of ``nn.Linear``, activations that act on every
    number by itself, and ``nn.Flatten``, all alike but for the numbers in them, on records of one
    input whose linear layers see vectors.

    Parameters
    ----------
    example : sequence of Tensor
        Inputs and target of one record, without a dimension of records.
    """
    if len(example) != 2:
        return f"records have {len(example) - 1} inputs, not one"
    for model in models:
        if (reason := _unknown(model, example[0].dim())) is not None:
            return reason
    shapes = [_description(model) for model in models]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            return f"model {index} differs from model 0: {shape} is not {shapes[0]}"
    return None


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    # Only of what `_unknown` has nothing against: named by their places, so once for each use.
    for layer in model.children():
        if type(layer) is nn.Sequential:
            yield from _layers(layer)
        else:
            yield layer


def _unknown(model: nn.Module, dimensions: int) -> str | None:
    if type(model) is not nn.Sequential:
        return f"{type(model).__name__} is not an nn.Sequential"
    if (reason := _unusual(model)) is not None:
        return reason
    for layer in _layers(model):
        if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
            dimensions = 1
        elif type(layer) is nn.Linear and dimensions != 1:
            return f"{layer} sees {dimensions} dimensions of a record, not a vector"
        elif type(layer) is not nn.Linear and (
            type(layer) not in _POINTWISE or getattr(layer, "inplace", False)
        ):
            return f"there is no stacked {layer}"
    return None


def _unusual(model: nn.Module) -> str | None:
    # What an instance may have that its class does not tell of.
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    held = [p for module in modules for p in module.parameters(recurse=False)]
    names = {name for module in modules for name, _ in module.named_parameters(recurse=False)}
    dtypes = {p.dtype for p in held}
    found = {
        "a layer is used twice": len({*map(id, modules)}) < len(modules),
        "two layers share a parameter": len({*map(id, held)}) < len(held),
        "there are buffers": any(True for _ in model.buffers()),
        "a layer has parameters beside its own": not names <= {"weight", "bias"},
        f"parameters of {sorted(map(str, dtypes))} are not all float32 or all float64": (
            dtypes not in ({torch.float32}, {torch.float64})
        ),
        "a layer has hooks, or a forward that is not its class's": any(
            "forward" in vars(m)
            or m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            for m in modules
        ),
    }
    return next((reason for reason, is_so in found.items() if is_so), None)


def _description(model: nn.Module) -> list[tuple[str, tuple[tuple[object, ...], ...]]]:
    return [
        (repr(layer), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()))
        for layer in _layers(model)
    ]


@dataclass(frozen=True, eq=False)
class _Linear:
    """The weights of one layer of all models, ``(models, m, n)`` and ``(models, m)``."""

    first: nn.Linear
    """The first model's: which of its parameters are trained holds for all."""
    weight: Tensor
    bias: Tensor | None

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.first.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight.transpose(1, 2))
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class StackedClipper:
    """Sums per-example gradients, each clipped in L2 over all trained parameters of its model.

    Batches have one shape, however many records a model's sample has; what is not counted is
    padding and adds exactly zero. So which operations run depends on no record, and what a model's
    sum holds, to the last bit, depends on that model's records alone.

    A record's bound is book-keeping's: `Clip` over `Contribution.squares`, rounding included.

    Parameters
    ----------
    models : sequence of nn.Module
        With which `unstackable` finds no fault. Their parameters are copied; see `write_back`.
    loss_fn : LossFunction
        One loss per record, the same for all models.
    clip : Clip
        Flat or automatic.

    Raises
    ------
    ValueError
        If the clip is by layer.

    Attributes
    ----------
    parameters : list of list of Parameter
        Of each model those that are trained, in the model's order, all views of the stack.
    dimension : int
        How many numbers they are in one model.
    """

    def __init__(self, models: Sequence[nn.Module], loss_fn: LossFunction, *, clip: Clip) -> None:
        if clip.by_layer:
            raise ValueError(f"clip.style={clip.style.value!r} must not be by layer in a stack")
        self._models, self._loss_fn, self._clip = list(models), loss_fn, clip
        self._steps: list[_Linear | nn.Module] = []
        stacks: list[Tensor] = []
        for layers in zip(*map(_layers, models), strict=True):
            first = layers[0]
            if not isinstance(first, nn.Linear):
                self._steps.append(first)
                continue
            held = [
                torch.stack([p.detach() for p in group])
                for group in zip(*(layer.parameters() for layer in layers), strict=True)
            ]
            stacks += held
            self._steps.append(_Linear(first, held[0], held[1] if len(held) > 1 else None))
        trained = [p.requires_grad for p in models[0].parameters()]
        self._trained = [stack for stack, is_ in zip(stacks, trained, strict=True) if is_]
        self.parameters = [
            [nn.Parameter(stack[index]) for stack in self._trained] for index in range(len(models))
        ]
        self.dimension = sum(stack[0].numel() for stack in self._trained)

    def zeros(self) -> Tensor:
        """Return the sums over no records, ``(models, dimension)``, float64."""
        device = self._trained[0].device
        return torch.zeros(len(self._models), self.dimension, dtype=torch.float64, device=device)

    def clipped_sums(self, batch: Batch, counted: Tensor) -> Tensor:
        """Return the sums of the clipped gradients, ``(models, dimension)``.

        A record whose gradient holds NaN or inf contributes zeros.

        Parameters
        ----------
        batch : sequence of Tensor
            The input, then the target, each ``(models, width, ...)``.
        counted : Tensor
            Which of them are records, bool of shape ``(models, width)``; the others are padding.
        """
        seen, gradients = self._backward(batch)
        squares = [
            part.squares()
            for layer, a, b in zip(seen, seen.values(), gradients, strict=True)
            for part in contributions(layer.first, a.flatten(0, 1), b.flatten(0, 1))
        ]
        scaling = self._clip.scaling(squares)
        gone = ~counted
        if scaling.dropped is not None:
            gone = gone | scaling.dropped.view_as(gone)
        gone = gone.unsqueeze(2)
        factors = scaling.factors[0].to(gradients[0].dtype).view_as(gone)
        sums = []
        for layer, a, b in zip(seen, seen.values(), gradients, strict=True):
            # Also where nothing is to be dropped: whether something is must not choose the kernels.
            scaled = b.masked_fill(gone, 0) * factors.masked_fill(gone, 0)
            if layer.first.weight.requires_grad:
                product = torch.bmm(scaled.transpose(1, 2), a.masked_fill(gone, 0))
                sums.append(product.flatten(1))
            if layer.bias is not None and layer.first.bias.requires_grad:
                sums.append(scaled.sum(1))
        return torch.cat(sums, 1)

    def _backward(self, batch: Batch) -> tuple[dict[_Linear, Tensor], list[Tensor]]:
        # What each trained layer got, and the gradient of the losses in what it returned.
        x, targets = batch
        seen: dict[_Linear, Tensor] = {}
        outputs = []
        with torch.enable_grad():
            for step in self._steps:
                if not isinstance(step, _Linear):
                    x = x.flatten(2) if isinstance(step, nn.Flatten) else step(x)
                    continue
                inputs, x = x.detach(), step(x)
                if step.trained:
                    seen[step] = inputs
                    outputs.append(x if x.requires_grad else x.requires_grad_())
            losses = per_example_losses(x.flatten(0, 1), targets.flatten(0, 1), self._loss_fn)
            total = losses.sum()
            if not total.requires_grad:
                return seen, [torch.zeros_like(z) for z in outputs]
            found = torch.autograd.grad(total, outputs, allow_unused=True)
        return seen, [
            torch.zeros_like(z) if g is None else g for z, g in zip(outputs, found, strict=True)
        ]

    def hand_out(self, gradients: Tensor) -> None:
        """Make row i of ``(models, dimension)`` the gradient of model i's `parameters`."""
        parts = torch.split(gradients, [stack[0].numel() for stack in self._trained], dim=1)
        for place, (part, stack) in enumerate(zip(parts, self._trained, strict=True)):
            rows = part.to(stack.dtype).view(stack.shape).unbind(0)
            for parameters, row in zip(self.parameters, rows, strict=True):
                parameters[place].grad = row

    def write_back(self) -> None:
        """Copy what was trained into the models."""
        with torch.no_grad():
            for model, parameters in zip(self._models, self.parameters, strict=True):
                trained = (p for p in model.parameters() if p.requires_grad)
                for parameter, own in zip(trained, parameters, strict=True):
                    parameter.copy_(own)
