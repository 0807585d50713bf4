"""What a traced step of a small model can do without: a third of its operations do nothing.

Every pass leaves each remaining number as it was, to the last bit.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

__all__ = ["peak_bytes", "simplify"]

aten = torch.ops.aten

_RESHAPING: Final = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
_SPREADING: Final = (*_RESHAPING, aten.unsqueeze.default)


def simplify(graph: GraphModule) -> None:
    """Take out what changes nothing and what nobody needs; tensors in, a list of tensors out."""
    _skip_idle(graph)
    _skip_products_with_one(graph)
    _keep_scalars(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.set_codegen(CodeGen())
    graph.recompile()


def peak_bytes(graph: GraphModule) -> int:
    """Return the most bytes that the values of a step take at once, inputs and results included.

    Views count as if they were copies.
    """
    nodes = list(graph.graph.nodes)
    last_use = {used: time for time, node in enumerate(nodes) for used in node.all_input_nodes}
    ends: dict[int, int] = {}
    held = peak = 0
    for time, node in enumerate(nodes):
        size = _bytes(node.meta.get("val"))
        held += size
        peak = max(peak, held)
        end = len(nodes) if node.op == "placeholder" else last_use.get(node, time)
        ends[end] = ends.get(end, 0) + size
        held -= ends.pop(time, 0)
    return peak


def _skip_idle(graph: GraphModule) -> None:
    """Skip reshaping into the same shape, multiplying by the number 1 and transposing twice."""
    for node in graph.graph.nodes:
        source: Any = node.args[0] if node.args else None
        before, after = _value(source), _value(node)
        if before is None or after is None or before.dtype != after.dtype:
            continue
        same = before.shape == after.shape and before.stride() == after.stride()
        if (node.target in _RESHAPING and same) or (
            node.target is aten.mul.Scalar and node.args[1] == 1
        ):
            node.replace_all_uses_with(source)
        elif (
            node.target is aten.transpose.int
            and source.target is aten.transpose.int
            and node.args[1:] == source.args[1:]
        ):
            node.replace_all_uses_with(source.args[0])


def _skip_products_with_one(graph: GraphModule) -> None:
    """Skip multiplying by the 1 that is the derivative of a loss by itself.

    Without that, nobody needs the value of the loss any more.
    """
    ones: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target is aten.ones_like.default or (
            node.target in _SPREADING and node.args[0] in ones
        ):
            ones.add(node)
        elif node.target is aten.mul.Tensor:
            for one, other in (node.args, reversed(node.args)):
                before, after = _value(other), _value(node)
                if (
                    one in ones
                    and before is not None
                    and after is not None
                    and (before.shape, before.dtype) == (after.shape, after.dtype)
                ):
                    node.replace_all_uses_with(other)
                    break


def _keep_scalars(graph: GraphModule) -> None:
    """Make each constant number once instead of in every step."""
    for index, node in enumerate(graph.graph.nodes):
        if node.target is aten.scalar_tensor.default and not node.all_input_nodes:
            name = f"scalar_{index}"
            graph.register_buffer(name, node.target(*node.args, **node.kwargs))
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return math.prod(value.shape) * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0
