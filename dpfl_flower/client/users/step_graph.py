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
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from dpfl_flower.client.per_example import LossFunction, per_example_losses

__all__ = ["SLOT_MULTIPLE", "StepGraph", "aligned_empty"]

SLOT_MULTIPLE: Final = 32
"""Twice the float32 entries of the widest vector register (AVX-512), as torch unrolls its loops."""

_ALIGNMENT: Final = 64

aten = torch.ops.aten
_RESHAPING: Final = (aten.expand.default, aten.view.default, aten._unsafe_view.default)


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
        self.bytes = _peak_bytes(graph)
        _drop_idle(graph)
        if device.type == "cpu":
            _align_products(graph)
        graph.graph.eliminate_dead_code()
        graph.graph.set_codegen(CodeGen())  # tensors in, tensors out, without nesting
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
    for node in graph.graph.nodes:
        if node.target is aten.bmm.default:
            node.target = _bmm


def _drop_idle(graph: GraphModule) -> None:
    """Take out what hands on its input as it is: of a small model's step that is a third."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        source = node.args[0] if node.args else None
        if not (isinstance(source, Node) and isinstance(source.meta.get("val"), Tensor)):
            continue
        before, after = source.meta["val"], node.meta["val"]
        same = before.shape == after.shape and before.stride() == after.stride()
        if (node.target in _RESHAPING and same and before.dtype == after.dtype) or (
            node.target is aten.mul.Scalar and node.args[1] == 1 and before.dtype == after.dtype
        ):
            node.replace_all_uses_with(source)
        elif (
            node.target is aten.transpose.int
            and source.target is aten.transpose.int
            and node.args[1:] == source.args[1:]
        ):
            node.replace_all_uses_with(source.args[0])


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all slots, from and into slots that begin at multiples of 64 bytes."""
    left, right = _aligned(left), _aligned(right)
    slots, rows, columns = len(left), left.shape[1], right.shape[2]
    padded = _padded(rows * columns, left.dtype)
    if padded == rows * columns:
        return torch.bmm(left, right)
    out = torch.empty_strided((slots, rows, columns), (padded, columns, 1), dtype=left.dtype)
    return torch.bmm(left, right, out=out).contiguous()


def _aligned(stack: Tensor) -> Tensor:
    _, rows, columns = stack.shape
    by_rows, by_columns = stack.stride()[1:] == (columns, 1), stack.stride()[1:] == (1, rows)
    begins = stack.stride(0) * stack.itemsize, stack.data_ptr()
    if (by_rows or by_columns) and not any(begin % _ALIGNMENT for begin in begins):
        return stack
    padded = _padded(rows * columns, stack.dtype)
    inner = (1, rows) if by_columns else (columns, 1)
    return torch.empty_strided(stack.shape, (padded, *inner), dtype=stack.dtype).copy_(stack)


def _peak_bytes(graph: GraphModule) -> int:
    """Return the most bytes that the values of a step take at once, inputs and results included."""
    last_use: dict[Node, int] = {}
    nodes = list(graph.graph.nodes)
    for time, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last_use[used] = time
    ends: dict[int, int] = {}
    held = peak = 0
    for time, node in enumerate(nodes):
        size = _bytes(node.meta.get("val"))
        held += size
        peak = max(peak, held)
        end = last_use.get(node, time)
        ends[end] = ends.get(end, 0) + size
        held -= ends.pop(time, 0)
    return peak


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return math.prod(value.shape) * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0
