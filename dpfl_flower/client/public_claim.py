"""What a node says in clear beside a masked vector: what its answers have cost, and nothing else.

>>> from dpfl_flower.accounting import Gaussian, events_to_json
>>> said = {
...     "epsilon": 0.5, "delta": 1e-5, "unit": "example", "relation": "add-or-remove-one",
...     "dataset": "heart", "durable": True, "events": events_to_json([Gaussian(9.0)]),
... }
>>> answer = RecordDict({"privacy": ConfigRecord(said | {"patients": 4711})})
>>> sorted(public_claim(answer)) == sorted(said)
True
"""

import math
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from dpfl_flower import checks, records
from dpfl_flower.accounting import PrivacyUnit, Relation
from dpfl_flower.accounting.accountant import require_supported
from dpfl_flower.accounting.events import events_from_json, events_to_json
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.grid_fields import number, text
from dpfl_flower.wire import config_record

__all__ = ["public_claim", "require_unclaimed"]

_EPSILON: Final = "epsilon"
_DELTA: Final = "delta"
_DURABLE: Final = "durable"
_CRYPTOGRAPHIC: Final = "cryptographic"
_EVENTS: Final = "events"
_TEXTS: Final = ("dataset", "unit", "relation", _EVENTS)


def public_claim(answer: RecordDict) -> ConfigRecord:
    """Return the privacy claim of an app's answer, the fields that a server reads and no other.

    A claim follows from the ledger alone, so that it may travel in clear. What an app put beside
    its fields stays on the node, the sentence that sums them up included.

    Raises
    ------
    NodeError
        MALFORMED_REPLY where the answer holds no claim that can be read: whether its noise was
        charged is then not known, and nothing of it may leave, masked or not.
    """
    found = config_record(answer, records.PRIVACY)
    if found is None:
        raise NodeError(
            NodeErrorCode.MALFORMED_REPLY, "the app's answer holds no privacy claim: nothing leaves"
        )
    try:
        claim = ConfigRecord({name: text(found, name) for name in _TEXTS})
        claim[_EVENTS] = events_to_json(events_from_json(text(found, _EVENTS)))
        claim[_EPSILON], claim[_DELTA] = number(found, _EPSILON), number(found, _DELTA)
        claim[_DURABLE] = _flag(found, _DURABLE)
        if _CRYPTOGRAPHIC in found:
            claim[_CRYPTOGRAPHIC] = _flag(found, _CRYPTOGRAPHIC)
        _check(claim)
    except Exception as error:  # whatever an app wrote
        raise NodeError(
            NodeErrorCode.MALFORMED_REPLY, f"the app's privacy claim cannot be read: {error!r}"
        ) from error
    return claim


def require_unclaimed(answer: RecordDict) -> None:
    """Refuse an answer that holds a privacy claim, where the sum is of answers that have none.

    Its arrays are noised, and its metrics are not: a server that asks a node with noise of its own
    for bounded updates and metrics would get the exact sum of what nobody has paid for.

    Raises
    ------
    NodeError
        MALFORMED_REPLY.
    """
    if config_record(answer, records.PRIVACY) is not None:
        raise NodeError(
            NodeErrorCode.MALFORMED_REPLY,
            "the app's answer holds a privacy claim, and is asked for as one without noise: "
            "SampleLevelFedAvg and LocalDPFedAvg ask for answers with claims",
        )


def _check(claim: ConfigRecord) -> None:
    epsilon = number(claim, _EPSILON)
    checks.probability(delta=number(claim, _DELTA))
    if math.isnan(epsilon) or epsilon < 0:
        raise ValueError(f"epsilon={epsilon!r} must be a number >= 0")
    unit = checks.choice(PrivacyUnit, unit=text(claim, "unit"))
    relation = checks.choice(Relation, relation=text(claim, "relation"))
    for event in events_from_json(text(claim, _EVENTS)):
        require_supported(event, relation, unit=unit)


def _flag(record: ConfigRecord, key: str) -> bool:
    value = record.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return value
