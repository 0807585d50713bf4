"""What the nodes' sides of all protocols for secure sums have in common.

>>> count_setting({"secagg-min-cohort": 5}, "secagg-min-cohort", 3)
5
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from dpfl_flower import records
from dpfl_flower.client.contribution_base import Contribution
from dpfl_flower.client.errors import NodeError, NodeErrorCode, app_failed
from dpfl_flower.secagg.encoding import Integers
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.journal import FileJournal, Journal, MemoryJournal, Progress
from dpfl_flower.secagg.session import LONGEST_SECONDS
from dpfl_flower.wire import config_record

__all__ = [
    "Contributed",
    "as_node_error",
    "contributed",
    "count_setting",
    "forget_expired",
    "journal_of",
    "path_setting",
    "remember",
]

_CODES: Final = {
    Refusal.MALFORMED: NodeErrorCode.MALFORMED_REQUEST,
    Refusal.TOO_FEW_NODES: NodeErrorCode.SECAGG_TOO_FEW_NODES,
    Refusal.THRESHOLD_TOO_LOW: NodeErrorCode.SECAGG_THRESHOLD_TOO_LOW,
    Refusal.PEER_KEY_CHANGED: NodeErrorCode.SECAGG_PEER_KEY_CHANGED,
    Refusal.SURVIVOR_AND_DROPPED: NodeErrorCode.SECAGG_SURVIVOR_AND_DROPPED,
    Refusal.ALREADY_UNMASKED: NodeErrorCode.SECAGG_ALREADY_UNMASKED,
    Refusal.REPLAYED: NodeErrorCode.SECAGG_REPLAYED,
    Refusal.OUT_OF_ORDER: NodeErrorCode.SECAGG_OUT_OF_ORDER,
    Refusal.UNCONFIRMED: NodeErrorCode.SECAGG_UNCONFIRMED,
    Refusal.JOURNAL: NodeErrorCode.SECAGG_JOURNAL,
}


@dataclass(frozen=True, eq=False)
class Contributed:
    """What a node's answer became.

    Attributes
    ----------
    vector : int32 or int64 array, shape (width,)
        To be masked or encrypted.
    claim : ConfigRecord or None
        The privacy claim that travels beside it in clear, where one must.
    """

    vector: Integers = field(repr=False)
    claim: ConfigRecord | None

    def beside(self, protected: RecordDict) -> RecordDict:
        """Return the protocol's records with the claim, and nothing else of the answer."""
        content = RecordDict(dict(protected))
        if self.claim is not None:
            content[records.PRIVACY] = self.claim
        return content


def as_node_error(refused: Refused) -> NodeError:
    """Return the error that a node answers a refusal with."""
    return NodeError(_CODES[refused.reason], str(refused))


def contributed(
    contribution: Contribution,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    *,
    width: int,
) -> Contributed:
    """Call the app and return the vector, shape ``(width,)``, that its answer makes, and its claim.

    Raises
    ------
    NodeError
        The app's own code, CLIENT_FAILED for one that is not known, or MALFORMED_REPLY.
    """
    # The records may be those of other nodes' messages too: they are replaced, never changed.
    message.content = contribution.task
    answered = call_next(message, context)
    if answered.has_error():
        raise app_failed(answered.error.code)
    claim = contribution.claim(answered.content)
    vector = contribution.vector(answered.content)
    if vector.shape != (width,):
        raise NodeError(
            NodeErrorCode.MALFORMED_REPLY,
            f"the app's vector has shape {vector.shape}, must be {(width,)}",
        )
    return Contributed(vector, claim)


def journal_of(context: Context) -> Journal:
    """Return the node's journal for this run: its file, or what the run's state remembers."""
    remembered = _recall(context)
    path = path_setting(context.node_config, records.SECAGG_JOURNAL)
    if path is None:
        return MemoryJournal(remembered)
    return FileJournal(Path(path), context.run_id, context.node_id, remembered=remembered)


def forget_expired(context: Context, name: str) -> None:
    """Delete the state of a round whose time is up, whatever has reached the node since.

    And one that no round leaves: damaged, or with more time left than any round has.
    """
    record = config_record(context.state, name)
    if record is None:
        return
    expires = record.get("expires")
    left = expires - time.time() if isinstance(expires, float) else math.nan
    if not 0 <= left <= LONGEST_SECONDS:
        del context.state[name]


def remember(context: Context, progress: Progress) -> None:
    """Note the progress in the run's state."""
    context.state[records.SECAGG_PROGRESS] = ConfigRecord(
        {"round": progress.server_round, "stage": progress.stage}
    )


def path_setting(node_config: Mapping[str, object], key: str) -> str | None:
    """Return a path of the node's config, or None; ValueError where it is something else."""
    value = node_config.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"node config {key}={value!r} must be a path")
    return value


def count_setting(node_config: Mapping[str, object], key: str, default: int) -> int:
    """Return an integer of the node's config; ValueError where it is something else."""
    value = node_config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"node config {key}={value!r} must be an integer")
    return value


def _recall(context: Context) -> Progress:
    record = config_record(context.state, records.SECAGG_PROGRESS)
    if record is None:
        return Progress()
    return Progress(int(str(record["round"])), int(str(record["stage"])))
