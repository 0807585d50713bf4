"""Strategies whose nodes evaluate nothing: what they measure is theirs, which no epsilon covers."""

from collections.abc import Iterable
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

__all__ = ["NobodyEvaluates"]


class NobodyEvaluates(Strategy):
    """A strategy that asks no node to evaluate, with a pipeline that subclasses leave alone."""

    _NOT_TO_OVERRIDE: Final = (
        "configure_train",
        "continue_train",
        "aggregate_train",
        "start",
        "weigh",
        "apply_noisy_mean",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pipeline = [base for base in cls.__mro__[1:] if issubclass(base, NobodyEvaluates)]
        if len(pipeline) < 2:  # the strategy itself
            return
        for name in cls._NOT_TO_OVERRIDE:
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} cannot be overridden: nodes add their noise to what "
                    "they are asked for, and the rest is the private pipeline. What becomes of "
                    "the noisy mean is up to server_optimizer="
                )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return None."""
        del server_round, replies
