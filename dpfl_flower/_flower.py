"""The one module that names private parts of Flower."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ErrorCode", "Run", "TaskIdentity", "acting_as", "assign_message_id"]


@contextmanager
def acting_as(node_id: int, *, run_id: int) -> Iterator[None]:
    """Let the messages made inside come from ``node_id``; Flower keeps this per process."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, node_id
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


def assign_message_id(message: Message) -> str:
    """Give ``message`` an id, as a Grid does when it sends one, and return it."""
    message_id = uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id
