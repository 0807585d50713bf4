"""Subclasses that redefine what is not theirs are refused, however they come by it."""

from collections.abc import Sequence
from typing import Final

__all__ = ["NOISE_BY_NODES", "refuse_overrides"]

NOISE_BY_NODES: Final = (
    "configure_train",
    "continue_train",
    "aggregate_train",
    "start",
    "weigh",
    "apply_noisy_mean",
)
"""What is no subclass's where nodes add the noise; the last two would never be called."""


def refuse_overrides(cls: type, strategy: type, names: Sequence[str], way_out: str) -> None:
    """Raise TypeError where ``cls`` has another attribute of these names than ``strategy``.

    A mixin's counts too.

    >>> class Pipeline:
    ...     def start(self): ...
    >>> class Mine(Pipeline):
    ...     def start(self): ...
    >>> refuse_overrides(Mine, Pipeline, ["start"], "hand in a Sampling")
    Traceback (most recent call last):
        ...
    TypeError: Mine.start belongs to the private pipeline and cannot be overridden; hand in a \
Sampling
    """
    for name in names:
        if getattr(cls, name, None) is not getattr(strategy, name, None):
            raise TypeError(
                f"{cls.__name__}.{name} belongs to the private pipeline and cannot be overridden; "
                f"{way_out}"
            )
