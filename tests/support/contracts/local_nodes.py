"""Puts local noise on each node, so that nodes which answer weights take part in `LocalDPFedAvg`.

What a node of a contract answers goes through `local_noise_mod`, as what an app behind it would.
"""

import copy
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from dpfl_flower import records
from dpfl_flower.client import local_noise_mod
from dpfl_strategies import LocalDPFedAvg
from tests.support.contracts.users_in_nodes import OneUserBehindEachNode
from tests.support.node import context


class LocalNoiseOnEachNode(OneUserBehindEachNode):
    """Bounds and noises what ``grid``'s nodes answer, on the nodes.

    Attributes
    ----------
    answered : list of Message
        What left the nodes.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.answered: list[Message] = []
        self._contexts: dict[int, Any] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        asked = {message.metadata.dst_node_id: message for message in messages}
        replies = self._grid.send_and_receive(asked.values(), timeout=timeout)
        noised = [self._noised(asked.get(r.metadata.src_node_id), r) for r in replies]
        self.answered += noised
        return noised

    def _noised(self, question: Message | None, reply: Message) -> Message:
        if question is None or records.LOCAL not in question.content:
            return reply
        node = question.metadata.dst_node_id
        ctx = self._contexts.setdefault(node, context(node_id=node))
        mine = copy.copy(question)
        mine.__dict__ = dict(question.__dict__)  # the mod replaces the content of its own message
        return local_noise_mod(dataset="x")(mine, ctx, lambda *_: reply)


class OnLocalNoise:
    """The strategy, started on a grid whose nodes add the noise."""

    def __init__(self, strategy: LocalDPFedAvg, clip_norm: float) -> None:
        self._strategy = strategy
        self.clip_norm = clip_norm
        self.grids: list[LocalNoiseOnEachNode] = []

    def start(self, grid: Grid, *arguments: Any, **settings: Any) -> Any:
        self.grids.append(LocalNoiseOnEachNode(grid))
        return self._strategy.start(self.grids[-1], *arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


def on_local_noise(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the contracts' settings for a strategy whose nodes have ledgers of their own."""
    changed = {**settings, "num_nodes": settings["sampling"].population}
    for name in ("weighting", "ledger", "sampling"):
        changed.pop(name, None)
    return changed
