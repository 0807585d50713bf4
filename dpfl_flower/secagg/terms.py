"""What the nodes of one sum have to agree on, as a digest that every key and mask is bound to.

A server that told nodes different things, one a coarse grid and the others one on which their noise
is next to nothing, would get masks that do not cancel. So would one that sent all nodes but one a
model, or a learning rate, under which their updates are zero, to find that one's in the sum
(Pasquini, Francati, Ateniese, "Eluding secure aggregation in federated learning via model
inconsistency", CCS 2022, whose remedy this is).

>>> from flwr.app import ConfigRecord
>>> first = RecordDict({"update": ConfigRecord({"clip-norm": 1.0})})
>>> other = RecordDict({"update": ConfigRecord({"clip-norm": 2.0})})
>>> terms_of(first) == terms_of(RecordDict(dict(first))), terms_of(first) == terms_of(other)
(True, False)
"""

import hashlib
import json

from flwr.app import ArrayRecord, MessageType, RecordDict

from dpfl_flower import records

__all__ = ["terms_of"]


def terms_of(content: RecordDict, message_type: str = MessageType.TRAIN) -> bytes:
    """Return the SHA-256 of all that nodes are asked: every record but the protocol's own.

    In the order that they have, which an app may go by, and with the type of the message: after
    ``train`` it may name one of several functions of the app.

    >>> from flwr.app import ConfigRecord
    >>> content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    >>> terms_of(content) == terms_of(content, "train.warmup")
    False
    """
    terms = [message_type] + [
        [
            name,
            type(record).__name__,
            _arrays(record)
            if isinstance(record, ArrayRecord)
            else [[key, _plain(value)] for key, value in record.items()],
        ]
        for name, record in content.items()
        if name != records.SECAGG
    ]
    text = json.dumps(terms, separators=(",", ":"))
    return hashlib.sha256(b"dpfl-flower terms 2\0" + text.encode()).digest()


def _arrays(record: ArrayRecord) -> list[list[object]]:
    """Return what each array is, its bytes as their SHA-256, in the order of the nodes' vectors.

    In another order one node's update of an array would be added to the others' of another array,
    and lie bare where theirs is zero.
    """
    return [
        [
            name,
            array.dtype,
            list(array.shape),
            array.stype,
            hashlib.sha256(array.data).hexdigest(),
        ]
        for name, array in record.items()
    ]


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # By type and exact text, so that 1, 1.0, True and "1" are four things.
    return [type(value).__name__, value.hex() if isinstance(value, bytes | float) else repr(value)]
