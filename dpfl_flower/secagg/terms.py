"""What the nodes of one sum have to agree on, as a digest that every key and mask is bound to.

A server that told nodes different things, one a coarse grid and the others one on which their noise
is next to nothing, would get masks that do not cancel.

>>> from flwr.app import ConfigRecord
>>> first = RecordDict({"update": ConfigRecord({"clip-norm": 1.0})})
>>> other = RecordDict({"update": ConfigRecord({"clip-norm": 2.0})})
>>> terms_of(first) == terms_of(RecordDict(dict(first))), terms_of(first) == terms_of(other)
(True, False)
"""

import hashlib
import json
from typing import Final

from flwr.app import RecordDict

from dpfl_flower import records

__all__ = ["terms_of"]

_NOT_TERMS: Final = (records.SECAGG, records.CONFIG)
"""The protocol's own record, and the app's configuration, which no bound depends on."""


def terms_of(content: RecordDict) -> bytes:
    """Return the SHA-256 of all that says how vectors are made: every config but `_NOT_TERMS`."""
    terms = {
        name: {key: _plain(value) for key, value in sorted(record.items())}
        for name, record in sorted(content.config_records.items())
        if name not in _NOT_TERMS
    }
    text = json.dumps(terms, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"dpfl-flower terms\0" + text.encode()).digest()


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # By type and exact text, so that 1, 1.0, True and "1" are four things.
    return [type(value).__name__, value.hex() if isinstance(value, bytes | float) else repr(value)]
