"""Puts one user behind each node, so that a strategy over users obeys the contracts over nodes.

The contracts speak to nodes that answer weights. Here each such answer becomes what an honest node
of a single user makes of it, with the library's own bound: one integer sum. What is no valid answer
goes through as it is, and so do errors, replies in another's name, and replies that come twice.
"""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import records
from dpfl_flower.client.users import CohortRequest
from dpfl_flower.layout import ArrayLayout
from dpfl_strategies import PrivateStrategy
from dpfl_strategies.messages import from_record
from dpfl_strategies.replies import parse_train


class OneUserBehindEachNode(Grid):
    """Turns the weights that ``grid``'s nodes answer into sums over one user each."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run):
        self._grid.set_run(run)

    @property
    def run(self):
        return self._grid.run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self):
        return self._grid.get_node_ids()

    def push_messages(self, messages):
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids):
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        asked = list(messages)
        replies = self._grid.send_and_receive(asked, timeout=timeout)
        return [summed(asked[0], reply) for reply in replies]


def summed(question: Message, reply: Message) -> Message:
    """Return the reply with an integer sum in the place of weights, where those are valid."""
    if reply.has_error() or records.COHORT not in question.content:
        return reply
    request = CohortRequest.from_config(question.content[records.COHORT])
    reference = from_record(question.content[records.ARRAYS])
    layout = ArrayLayout.of(reference)
    trained = parse_train(reply, layout)
    if trained is None:
        return reply
    bounded = request.open_sum()
    bounded.add(layout.released(trained.arrays), layout.released(reference))
    content = RecordDict({records.INTEGER_SUM: ArrayRecord({records.SUM: Array(bounded.total)})})
    for name, metrics in reply.content.metric_records.items():
        content[name] = metrics
    answer = copy.copy(reply)
    answer.__dict__ = dict(reply.__dict__)
    answer.content = content
    return answer


class OverUsers:
    """The strategy, started on a grid whose nodes hold a user each."""

    def __init__(self, strategy: PrivateStrategy) -> None:
        self._strategy = strategy

    def start(self, grid: Grid, *arguments: Any, **settings: Any) -> Any:
        return self._strategy.start(OneUserBehindEachNode(grid), *arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


def over_users(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the contracts' settings for a strategy whose units live one to a node."""
    changed = {**settings, "num_nodes": settings["sampling"].population}
    changed["weighting"] = None  # a node of many users has no weight
    if changed.get("budget") is None:
        changed["unit"] = "user"
    else:
        changed["budget"] = dataclasses.replace(changed["budget"], unit="user")
    return changed
