"""For each kind of layer, its per-example gradients from what went in and what came back.

>>> layer = nn.Linear(2, 3)
>>> (part,) = contributions(layer, torch.ones(5, 2), torch.ones(5, 3))
>>> part.squares()  # 3 * 2 weights and 3 biases, all of derivative 1
tensor([9., 9., 9., 9., 9.], dtype=torch.float64)
>>> unsupported(nn.Sequential(layer, nn.PReLU()))
'1: PReLU'
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_sample.contributions import Contribution, Ghost, Held, Outer, Rows
from dpfl_flower.client.per_sample.patches import patches

Rule = Callable[[Any, Tensor, Tensor], list[Contribution]]

_HELD_GROWTH: Final = 4
_PATCHES: Final = 1 << 20
"""Numbers of patches at once on a CPU: 4 MiB stay in cache."""
_PATCHES_ON_DEVICE: Final = 1 << 26
"""The same on a device, 256 MiB: copied in many times what it takes to launch the next part."""


def contributions(module: nn.Module, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    """Return what the records contribute to the trainable parameters of ``module``.

    Parameters
    ----------
    module : nn.Module
        One that `unsupported` does not name.
    inputs, gradients : Tensor
        What the layer got, and the gradient of the summed losses in what it returned; the first
        dimension counts the records. Half precision is widened to float32.
    """
    return _RULES[type(module)](module, _widened(inputs), _widened(gradients))


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold a trainable parameter themselves, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }


def unsupported(model: nn.Module) -> str | None:
    """Name the first layer there is no rule for, None where there is one for all.

    A subclass may compute something else, so it has no rule. Neither has a layer with parameters
    beside its own, or an embedding that counts over the batch.
    """
    for name, module in owners(model).items():
        known = {"weight", "bias"}
        if (
            type(module) not in _RULES
            or not dict(module.named_parameters(recurse=False)).keys() <= known
        ):
            return f"{name}: {type(module).__name__}"
        if isinstance(module, nn.EmbeddingBag) and (
            module.mode == "max" or module.scale_grad_by_freq or module.max_norm is not None
        ):
            return f"{name}: {module}"
        if isinstance(module, nn.Embedding) and (
            module.scale_grad_by_freq or module.max_norm is not None
        ):
            return f"{name}: {module}"
    return None


def least_dimensions(module: nn.Module) -> int:
    """Return how many dimensions the input of ``module`` has at least, the records' included."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 2 + len(module.kernel_size)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 1 + len(module.normalized_shape)
    if isinstance(module, nn.InstanceNorm3d):
        return 5
    if isinstance(module, nn.InstanceNorm2d):
        return 4
    if isinstance(module, nn.InstanceNorm1d):
        return 3
    return 1 if isinstance(module, nn.Embedding) else 2


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _trainable(module: nn.Module, *names: str) -> tuple[nn.Parameter, ...]:
    found = [module._parameters.get(name) for name in names]
    return tuple([p for p in found if p is not None and p.requires_grad])


def _linear(module: nn.Linear, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    parameters = _trainable(module, "weight", "bias")
    if inputs.dim() == 2 and parameters[0].dim() == 2:  # the weight's, if it is trained
        return [Outer(parameters, inputs, gradients)]
    return _products(
        module,
        inputs.reshape(len(inputs), -1, inputs.shape[-1]),
        gradients.reshape(len(gradients), -1, gradients.shape[-1]),
    )


def _products(module: nn.Module, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    # inputs (records, T, n), gradients (records, T, m): the weight's gradient is a sum over T.
    positions, n, m = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    parameters = _trainable(module, "weight", "bias")
    if not _trainable(module, "weight"):
        return [Held(parameters, [gradients.sum(1)])]
    if positions == 1:
        return [Outer(parameters, inputs[:, 0], gradients[:, 0])]
    # Holding costs the least work. Not where it would take far more memory than inner products of
    # positions and the activations that it replaces (mixed: Bu et al., arXiv 2205.10683).
    if n * m <= max(2 * positions**2, _HELD_GROWTH * positions * (n + m)):
        held = [torch.bmm(gradients.transpose(1, 2), inputs), gradients.sum(1)]
        return [Held(parameters, held[: len(parameters)])]
    return [Ghost(parameters, inputs, gradients)]


def _convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, gradients: Tensor
) -> list[Contribution]:
    parameters = _trainable(module, "weight", "bias")
    flat = gradients.flatten(2)  # (records, m, T)
    if not _trainable(module, "weight"):
        return [Held(parameters, [flat.sum(2)])]
    positions, m = flat.shape[2], module.out_channels // module.groups
    n = math.prod(module.weight.shape[1:])
    if module.groups == 1 and n * m > max(2 * positions**2, _HELD_GROWTH * positions * (n + m)):
        columns = patches(module, inputs).squeeze(1)  # (records, n, T)
        return [Ghost(parameters, columns.transpose(1, 2), flat.transpose(1, 2))]
    of_groups = flat.reshape(len(flat), module.groups, m, positions)
    weights = flat.new_empty((len(flat), module.groups, m, n))
    # Patches are many times the input: so many records at a time that their memory is bounded.
    most = _PATCHES if inputs.device.type == "cpu" else _PATCHES_ON_DEVICE
    size = max(1, most // (module.groups * n * positions))
    for part, of_part, into in zip(
        *(torch.split(tensor, size) for tensor in (inputs, of_groups, weights)), strict=True
    ):
        torch.matmul(of_part, patches(module, part).transpose(2, 3), out=into)
    return [Held(parameters, [weights, flat.sum(2)][: len(parameters)])]


def _embedding(module: nn.Embedding, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    return _rows(
        module,
        inputs.reshape(len(inputs), -1),
        gradients.reshape(len(gradients), -1, gradients.shape[-1]),
    )


def _embedding_bag(
    module: nn.EmbeddingBag, inputs: Tensor, gradients: Tensor
) -> list[Contribution]:
    if inputs.dim() != 2:
        raise ModelRefused("an EmbeddingBag takes one bag per record: ids of two dimensions")
    spread = gradients.unsqueeze(1).expand(-1, inputs.shape[1], -1)
    if module.mode == "mean":
        counted = torch.ones_like(inputs, dtype=gradients.dtype)
        if module.padding_idx is not None:
            counted = (inputs != module.padding_idx).to(gradients.dtype)
        spread = spread / counted.sum(1).clamp(min=1)[:, None, None]
    return _rows(module, inputs, spread)


def _rows(
    module: nn.Embedding | nn.EmbeddingBag, ids: Tensor, gradients: Tensor
) -> list[Contribution]:
    if module.padding_idx is not None:
        gradients = gradients.masked_fill((ids == module.padding_idx).unsqueeze(2), 0)
    return [Rows(cast(nn.Parameter, module.weight), ids.long(), gradients)]


def _layer_norm(module: nn.LayerNorm, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    shape = module.normalized_shape
    normal = nn.functional.layer_norm(inputs, shape, eps=module.eps)
    return _affine(module, normal, gradients, lambda t: t.reshape(len(t), -1, *shape).sum(1))


def _rms_norm(module: nn.RMSNorm, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    shape = list(module.normalized_shape)
    normal = nn.functional.rms_norm(inputs, shape, eps=module.eps)
    return _affine(module, normal, gradients, lambda t: t.reshape(len(t), -1, *shape).sum(1))


def _group_norm(module: nn.GroupNorm, inputs: Tensor, gradients: Tensor) -> list[Contribution]:
    normal = nn.functional.group_norm(inputs, module.num_groups, eps=module.eps)
    return _affine(module, normal, gradients, _over_positions)


def _instance_norm(
    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d,
    inputs: Tensor,
    gradients: Tensor,
) -> list[Contribution]:
    normal = nn.functional.instance_norm(inputs, eps=module.eps)
    return _affine(module, normal, gradients, _over_positions)


def _over_positions(gradients: Tensor) -> Tensor:
    return gradients.reshape(*gradients.shape[:2], -1).sum(2)


def _affine(
    module: nn.Module, normal: Tensor, gradients: Tensor, add: Callable[[Tensor], Tensor]
) -> list[Contribution]:
    # add sums over positions: the parameters' shape is left, after the records.
    held = []
    if _trainable(module, "weight"):
        held.append(add(normal * gradients))
    if _trainable(module, "bias"):
        held.append(add(gradients))
    return [Held(_trainable(module, "weight", "bias"), held)]


_RULES: Final[Mapping[type[nn.Module], Rule]] = MappingProxyType(
    {
        nn.Linear: _linear,
        nn.Conv1d: _convolution,
        nn.Conv2d: _convolution,
        nn.Conv3d: _convolution,
        nn.Embedding: _embedding,
        nn.EmbeddingBag: _embedding_bag,
        nn.LayerNorm: _layer_norm,
        nn.RMSNorm: _rms_norm,
        nn.GroupNorm: _group_norm,
        nn.InstanceNorm1d: _instance_norm,
        nn.InstanceNorm2d: _instance_norm,
        nn.InstanceNorm3d: _instance_norm,
    }
)
