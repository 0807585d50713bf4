"""Between arrays and Flower messages."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.wire import read_array, write_array

Arrays = Mapping[str, NDArray[Any]]


def from_record(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the record's arrays by name, in its order: read-only views of its own bytes."""
    return {name: read_array(array) for name, array in record.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return a record of ``arrays``, in their order."""
    return ArrayRecord({name: write_array(np.asarray(array)) for name, array in arrays.items()})


def to_messages(
    nodes: Iterable[int],
    message_type: str,
    *,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    extra: RecordDict | None = None,
    part_of: Callable[[int], ArrayRecord | None] = lambda _: None,
) -> list[Message]:
    """Return one message for each node, all with the same content, grouped by round.

    ``extra`` records go along beside the arrays and the config. ``part_of`` names nodes, by id,
    that are sent other arrays than all the others.
    """
    config[records.SERVER_ROUND] = server_round

    def content(node: int) -> RecordDict:
        part = part_of(node)
        found = RecordDict({records.ARRAYS: part or arrays, records.CONFIG: config})
        for name, record in (extra or {}).items():
            found[name] = record
        return found

    group = str(server_round)
    return [Message(content(node), node, message_type, group_id=group) for node in nodes]
