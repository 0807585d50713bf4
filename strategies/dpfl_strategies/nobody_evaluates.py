"""Strategies whose nodes evaluate nothing: what they measure is theirs, which no epsilon covers."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

__all__ = ["NobodyEvaluates"]


class NobodyEvaluates(Strategy):
    """A strategy that asks no node to evaluate."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return None."""
        del server_round, replies
