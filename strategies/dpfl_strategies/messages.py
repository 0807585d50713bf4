"""Between arrays and Flower messages."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from dpfl_flower import records

Arrays = Mapping[str, NDArray[Any]]


def from_record(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the record's arrays by name, in its order."""
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return a record of ``arrays``, in their order."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def to_messages(
    nodes: Iterable[int],
    message_type: str,
    *,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    extra: RecordDict | None = None,
) -> list[Message]:
    """Return one message for each node, all with the same content, grouped by round.

    ``extra`` records go along beside the arrays and the config.
    """
    config[records.SERVER_ROUND] = server_round
    content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
    for name, record in (extra or {}).items():
        content[name] = record
    return [Message(content, node, message_type, group_id=str(server_round)) for node in nodes]
