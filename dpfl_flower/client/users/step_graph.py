"""One local step of a whole stack of users, as a flat list of tensor operations.

``torch.vmap`` turns the gradient of one user's loss into the gradients of all users' losses; the
result is traced once, for the one shape that a stack has, and from then on runs without autograd
or vmap, of which a small model would otherwise consist.

A user's slot must hold the same bits wherever it is in the stack and whoever is beside it.
Three things would break that, and are avoided here or by whoever fills the stack:

- vector loops hand their last few entries to scalar code, which rounds ``sigmoid`` and others
  differently: slots come in multiples of ``SLOT_MULTIPLE``, so that there are no last few;
- threads cut such loops anywhere: a stack on a CPU runs in one thread;
- matrix products choose their code by where an operand begins: every slot begins at a multiple of
  64 bytes (`_bmm`).

`dpfl_flower.client.users.isolation` checks the outcome on the machine at hand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dpfl_flower.client.per_example import LossFunction, per_example_losses
from dpfl_flower.client.users import graph_passes

__all__ = ["SLOT_MULTIPLE", "StepGraph", "aligned_empty"]

SLOT_MULTIPLE: Final = 32
"""Twice the float32 entries of the widest vector register (AVX-512), as torch unrolls its loops."""

_ALIGNMENT: Final = 64


@final
class StepGraph:
    """The gradients of each slot's weighted loss, all slots at once.

    Parameters
    ----------
    model : nn.Module
        Called as a function: its own parameters stay untouched.
    loss_fn : callable
        One loss per record.
    parameters : mapping of name to Tensor
        What is trained; each slot has its own.
    fixed : mapping of name to Tensor
        Frozen parameters and buffers, the same in all slots.
    example : sequence of Tensor
        One record's inputs and target, without the dimension of records: only shapes and dtypes.
    slots, batch_size : int
    device : torch.device

    Raises
    ------
    Exception
        Whatever torch says of a model that vmap cannot handle: one that draws random numbers,
        changes a buffer or branches on a value.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        parameters: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        example: Sequence[Tensor],
        slots: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.slots = slots
        names, fixed_names = list(parameters), list(fixed)

        def loss(
            trained: list[Tensor], kept: list[Tensor], batch: list[Tensor], weights: Tensor
        ) -> Tensor:
            values = dict(zip(names + fixed_names, [*trained, *kept], strict=True))
            outputs = functional_call(model, values, tuple(batch[:-1]))
            return (per_example_losses(outputs, batch[-1], loss_fn) * weights).sum()

        gradients = vmap(grad(loss), in_dims=(0, None, 0, 0))
        stacked = [aligned_empty(slots, p) for p in parameters.values()]
        kept = [tensor.detach() for tensor in fixed.values()]
        # Nobody reads or writes these: memory is reserved, not used.
        batch = [
            torch.empty((slots, batch_size, *part.shape), dtype=part.dtype, device=device)
            for part in example
        ]
        floating = [p.dtype for p in parameters.values() if p.is_floating_point()]
        self._weights = reduce(torch.promote_types, floating, torch.float32)
        weights = torch.empty((slots, batch_size), dtype=self._weights, device=device)
        graph = make_fx(gradients, tracing_mode="fake", _allow_non_fake_inputs=True)(
            stacked, kept, batch, weights
        )
        self.bytes = graph_passes.peak_bytes(graph)
        graph_passes.simplify(graph)
        if device.type == "cpu":
            _align_products(graph)
        graph.recompile()
        self._fixed = kept
        self._graph: Callable[..., Sequence[Tensor]] = graph

    def gradients(
        self, parameters: Sequence[Tensor], batch: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor]:
        """Return, for each parameter, the gradients of all slots.

        Parameters
        ----------
        parameters : sequence of Tensor, each (slots, ...)
            From :func:`aligned_empty`.
        batch : sequence of Tensor, each (slots, batch_size, ...)
            Contiguous.
        weights : floating Tensor, shape (slots, batch_size)
            Of each record in its slot's loss.
        """
        weights = weights.to(self._weights)
        return list(self._graph(*parameters, *self._fixed, *batch, weights))


def aligned_empty(slots: int, like: Tensor) -> Tensor:
    """Return memory for ``slots`` tensors like ``like``, each beginning at a multiple of 64 bytes.

    >>> aligned_empty(32, torch.zeros(3, 5)).stride()
    (16, 5, 1)
    """
    shape = (slots, *like.shape)
    inner = torch.empty(like.shape, device="meta").stride()
    return torch.empty_strided(
        shape, (_padded(like.numel(), like.dtype), *inner), dtype=like.dtype, device=like.device
    )


def _padded(entries: int, dtype: torch.dtype) -> int:
    multiple = _ALIGNMENT // dtype.itemsize
    return -(-entries // multiple) * multiple


def _align_products(graph: GraphModule) -> None:
    """Let every batched product read from, and write into, slots that begin at 64 bytes."""
    aligned: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.bmm.default:
            continue
        for operand in node.args:
            if operand not in aligned:
                with graph.graph.inserting_before(node):
                    aligned[operand] = graph.graph.call_function(_aligned, (operand,))
        node.args = tuple(aligned[operand] for operand in node.args)
        node.target = _bmm


def _aligned(stack: Tensor) -> Tensor:
    """Return the stack, or a copy whose slots begin at multiples of 64 bytes."""
    _, rows, columns = stack.shape
    outer, *inner = stack.stride()
    by_columns = inner == [1, rows]
    if (by_columns or inner == [columns, 1]) and not (
        outer * stack.itemsize % _ALIGNMENT or stack.data_ptr() % _ALIGNMENT
    ):
        return stack
    strides = (1, rows) if by_columns else (columns, 1)
    padded = _padded(rows * columns, stack.dtype)
    return torch.empty_strided(stack.shape, (padded, *strides), dtype=stack.dtype).copy_(stack)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all slots, computed where each begins at a multiple of 64 bytes.

    Only into contiguous memory is the product one call. Where its slots would begin elsewhere, it
    is computed with more rows or columns, whichever are less to copy, and cut.
    """
    rows, columns = left.shape[1], right.shape[2]
    multiple = _ALIGNMENT // left.itemsize
    if rows * columns % multiple == 0:
        return torch.bmm(left, right)
    more_rows, more_columns = _fitting(rows, columns, multiple), _fitting(columns, rows, multiple)
    if more_rows * left.shape[2] < more_columns * right.shape[1]:
        left = nn.functional.pad(left, (0, 0, 0, more_rows - rows))
    else:
        right = nn.functional.pad(right, (0, more_columns - columns))
    return torch.bmm(_aligned(left), _aligned(right))[:, :rows, :columns].contiguous()


def _fitting(size: int, other: int, multiple: int) -> int:
    """Return the least size from ``size`` on that makes ``size * other`` a multiple."""
    factor = multiple // math.gcd(other, multiple)
    return -(-size // factor) * factor
