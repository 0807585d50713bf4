"""Copies of messages and contexts, as between processes: neither side sees the other's changes.

Records are made anew from what they hold, whose bytes nobody can change: a deep copy of them takes
three times as long.

>>> sent = RecordDict({"config": ConfigRecord({"steps": [1, 2]})})
>>> found = copied_records(sent)
>>> found["config"]["steps"].append(3)
>>> sent["config"]["steps"]
[1, 2]
"""

import copy
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

__all__ = ["ConfigRecord", "copied_context", "copied_message", "copied_records"]


def copied_message(message: Message) -> Message:
    """Return a copy that shares nothing that can be changed."""
    known = {}
    if message.has_content():
        known[id(message.content)] = copied_records(message.content)
    return copy.deepcopy(message, known)


def copied_context(context: Context) -> Context:
    """Return a copy that shares nothing that can be changed."""
    return copy.deepcopy(context, {id(context.state): copied_records(context.state)})


def copied_records(content: RecordDict) -> RecordDict:
    """Return a copy that shares nothing but bytes."""
    return RecordDict({name: _copied(record) for name, record in content.items()})


def _copied(
    record: ArrayRecord | ConfigRecord | MetricRecord,
) -> ArrayRecord | ConfigRecord | MetricRecord:
    if type(record) is ArrayRecord:
        return ArrayRecord(
            {
                name: Array(dtype=a.dtype, shape=tuple(a.shape), stype=a.stype, data=a.data)
                for name, a in record.items()
            }
        )
    if type(record) in (ConfigRecord, MetricRecord):
        values: dict[str, Any] = {
            name: list(value) if isinstance(value, list) else value
            for name, value in record.items()
        }
        return type(record)(values)
    return copy.deepcopy(record)
