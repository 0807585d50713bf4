"""A Flower Grid in this process that records everything pushed through it."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from dpfl_flower._flower import TaskIdentity
from dpfl_flower.wire import read_array

Client = Callable[[Message], RecordDict | Error | None]


class RecordingGrid(Grid):
    """Calls ``client(message)`` for each push; None stands for a node that never answers in time.

    Attributes
    ----------
    pushed:
        Every message, in order of pushing.
    replied:
        Every reply that was handed out, in order.
    """

    def __init__(self, client: Client, num_nodes: int) -> None:
        TaskIdentity.run_id = 1
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = 1
        self.client = client
        self.node_ids = list(range(100, 100 + num_nodes))
        self.pushed: list[Message] = []
        self.replied: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.node_ids)

    def push_messages(self, messages: Iterable[Message]):
        ids = []
        for message in messages:
            message_id = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = message_id
            self.pushed.append(message)
            answer = self.client(message)
            if answer is not None:
                self._replies[message_id] = Message(answer, reply_to=message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        found = [self._replies.pop(i) for i in message_ids if i in self._replies]
        self.replied.extend(found)
        return found

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def record(*arrays, names=None) -> ArrayRecord:
    """Return an ArrayRecord of ``arrays`` named a0, a1, ... (or ``names``)."""
    names = names or [f"a{i}" for i in range(len(arrays))]
    return ArrayRecord({n: Array(np.asarray(a)) for n, a in zip(names, arrays, strict=True)})


def reply(arrays: ArrayRecord, num_examples=1, **metrics) -> RecordDict:
    """Return what an unchanged Flower ClientApp answers."""
    return RecordDict(
        {"arrays": arrays, "metrics": MetricRecord({"num-examples": num_examples, **metrics})}
    )


def adding(update: float | Callable[[Message], np.ndarray]) -> Client:
    """Return a client that adds ``update`` to every floating array it is sent."""

    def client(message: Message) -> RecordDict:
        step = update(message) if callable(update) else update
        sent = {name: read_array(array) for name, array in message.content["arrays"].items()}
        return reply(
            ArrayRecord(
                {
                    name: Array(
                        np.asarray(array + step, dtype=array.dtype)
                        if np.issubdtype(array.dtype, np.floating)
                        else array
                    )
                    for name, array in sent.items()
                }
            )
        )

    return client


def config_of(message: Message) -> ConfigRecord:
    """Return the config record of a pushed message."""
    return message.content["config"]
