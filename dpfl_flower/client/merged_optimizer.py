"""One optimizer for many models where that is the same as one for each.

>>> parameters = [[nn.Parameter(torch.zeros(2))] for _ in range(3)]
>>> optimizers = merged(lambda p: torch.optim.SGD(p, lr=0.1), parameters)
>>> len(optimizers), len(optimizers[0].param_groups[0]["params"])
(1, 3)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import nn

__all__ = ["merged", "nn", "torch"]

_ENTRYWISE: Final = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.SGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
    }
)
"""What moves each number by its own gradient and its own state alone."""


def merged(
    factory: Callable[[Iterable[nn.Parameter]], Any], parameters: Sequence[Sequence[nn.Parameter]]
) -> list[Any]:
    """Build an optimizer for each model; return one that holds all parameters where it may.

    It may where all are of one of torch's own kinds that move each number by itself, without hooks
    or a scheduler, and with the same groups of settings. Else all are returned.

    Parameters
    ----------
    factory : Callable[[Iterable[Parameter]], Optimizer]
    parameters : sequence of sequence of Parameter
        Of each model.
    """
    optimizers = [factory(of_model) for of_model in parameters]
    first = optimizers[0]
    if len(optimizers) == 1 or not all(map(_plain, optimizers)):
        return optimizers
    if any(_settings(other) != _settings(first) for other in optimizers):
        return optimizers
    for other in optimizers[1:]:
        for group, more in zip(first.param_groups, other.param_groups, strict=True):
            group["params"] += more["params"]
    return [first]


def _plain(optimizer: Any) -> bool:
    return (
        type(optimizer) in _ENTRYWISE
        and not optimizer.state  # Adagrad has made some already: it stays with its own
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and "step" not in vars(optimizer)  # where a scheduler puts its own
    )


def _settings(optimizer: Any) -> tuple[type, list[dict[str, Any]]]:
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    return type(optimizer), groups
