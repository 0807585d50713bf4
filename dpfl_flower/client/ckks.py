"""The node's side of secure aggregation by CKKS, as a mod around an app's train function.

>>> from flwr.clientapp import ClientApp
>>> app = ClientApp()
>>> @app.train(mods=[ckks_mod])
... def train(message: Message, context: Context) -> Message:
...     return message  # trains, and answers as it would without
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from dpfl_flower import checks, records
from dpfl_flower.client.contribution import contribution_for
from dpfl_flower.client.errors import NodeError, NodeErrorCode, answer
from dpfl_flower.client.secure_node import (
    as_node_error,
    contributed,
    count_setting,
    forget_expired,
    journal_of,
    path_setting,
    remember,
)
from dpfl_flower.secagg.ckks_key import SecretKey
from dpfl_flower.secagg.ckks_messages import (
    DecryptRequest,
    Encrypted,
    EncryptRequest,
    decode_request,
    encode,
)
from dpfl_flower.secagg.digits import DigitCode
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.session import LONGEST_SECONDS
from dpfl_flower.secagg.wire import from_config, to_config
from dpfl_flower.wire import config_record, write_array

__all__ = ["ckks_mod"]

_LEAST_COHORT: Final = 3
_ENCRYPTING: Final = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK)
"""The first stage of this protocol is the first three of the journal's, the second its last."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What a node keeps of a round between its two stages; nothing in it is secret."""

    server_round: int
    width: int
    bits: int
    parties: int
    expires: float


def ckks_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer both stages of `dpfl_flower.secagg.CKKS`; the app is called for its vector only.

    Only that vector leaves, encrypted; and the sum, where this node is asked to decrypt it, once a
    round at most. A train message that is no stage of the protocol is refused. Messages of other
    kinds pass.

    The node's own config: ``ckks-key``, the file ``nodes.ckks`` that `make_key` wrote;
    ``secagg-min-cohort`` (3), the fewest vectors in a sum that it decrypts; ``secagg-journal``, a
    file in which each stage is noted before it is answered, so that no crash or replay makes it
    decrypt twice. ``secagg-colluders`` above 0, ``secagg-identity`` and ``secagg-roster`` ask for
    what this protocol cannot give: with them everything is refused. So is distributed noise.

    Before it answers a sum the node checks that it was in the round, that the sum counts as many
    vectors as the server names and its own minimum, and that it is a sum of digits at all. It
    cannot check that the server made it of different nodes' vectors: a server that lies can encrypt
    zeros, add them to one node's ciphertext, and be told what that node sent.

    Everything that goes wrong is logged on the node and answered with a `NodeErrorCode`.
    """
    forget_expired(context, records.CKKS_STATE)
    if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return call_next(message, context)
    try:
        return _answer(message, context, call_next)
    except Refused as refused:
        return answer(as_node_error(refused), reply_to=message)
    except (Exception, SystemExit) as error:  # sys.exit carries text of the app's too
        return answer(error, reply_to=message)


def _answer(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    if config_record(message.content, records.SECAGG) is None:
        raise NodeError(
            NodeErrorCode.SECAGG_REQUIRED,
            "a train message without the protocol: the strategy must have "
            "secure_aggregation=CKKS(...), or the app must not have ckks_mod",
        )
    least = _min_cohort(context.node_config)
    key = _key(context.node_config)
    try:
        request, ciphertexts = decode_request(message.content)
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, str(error)) from error
    journal = journal_of(context)
    for stage in (Stage.UNMASK,) if isinstance(request, DecryptRequest) else _ENCRYPTING:
        journal.enter(request.server_round, stage)
        remember(context, journal.progress)
    # From here on the stage counts as answered, and whatever fails ends the round for this node.
    known = _take_round(context)
    if isinstance(request, EncryptRequest):
        return _encrypt(request, key, least, message, context, call_next)
    if known is None or known.server_round != request.server_round:
        raise Refused(Refusal.OUT_OF_ORDER, "this node is not, or no longer, part of the round")
    return _decrypt(request, ciphertexts, known, key, least, message, context.node_id)


def _encrypt(
    request: EncryptRequest,
    key: SecretKey,
    least: int,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> Message:
    if records.DISTRIBUTED in message.content:
        raise NodeError(
            NodeErrorCode.POLICY_REFUSED,
            "distributed noise is not accounted for against nodes that see sums of digits",
        )
    if request.key != key.fingerprint:
        raise NodeError(
            NodeErrorCode.SECAGG_KEY,
            f"the server's key {request.key.hex()} is not this node's {key.fingerprint.hex()}",
        )
    if request.parties < least:
        raise Refused(
            Refusal.TOO_FEW_NODES,
            f"parties={request.parties} must be >= {least}, this node's own "
            f"{records.SECAGG_MIN_COHORT}",
        )
    try:
        checks.positive(seconds=request.seconds)
        checks.at_most(LONGEST_SECONDS, seconds=request.seconds)
        code = DigitCode(width=request.width, bits=request.bits, parties=request.parties)
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, str(error)) from error
    contribution = contribution_for(
        message.content, context.node_config, width=request.width, bits=request.bits
    )
    made = contributed(contribution, message, context, call_next, width=request.width)
    reply = encode(Encrypted(key=key.fingerprint), key.encrypt(code.encode(made.vector)))
    context.state[records.CKKS_STATE] = to_config(
        _Round(
            server_round=request.server_round,
            width=request.width,
            bits=request.bits,
            parties=request.parties,
            expires=time.time() + request.seconds,
        )
    )
    return Message(made.beside(reply), reply_to=message)


def _decrypt(
    request: DecryptRequest,
    ciphertexts: Sequence[bytes],
    known: _Round,
    key: SecretKey,
    least: int,
    message: Message,
    node_id: int,
) -> Message:
    survivors = set(request.survivors)
    if len(survivors) < least:
        raise Refused(
            Refusal.TOO_FEW_NODES,
            f"{len(survivors)} survivors must be >= {least}, this node's own "
            f"{records.SECAGG_MIN_COHORT}",
        )
    code = DigitCode(width=known.width, bits=known.bits, parties=known.parties)
    try:
        if len(survivors) != len(request.survivors) or len(survivors) > known.parties:
            raise ValueError(f"survivors must be different, and at most {known.parties}")
        if node_id not in survivors:
            raise ValueError("this node must be among the survivors")
        if len(ciphertexts) != code.chunks:
            raise ValueError(f"{len(ciphertexts)} ciphertexts must be {code.chunks}")
        total = code.decode(key.decrypt(ciphertexts), parties=len(survivors))
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, str(error)) from error
    content = RecordDict(
        {
            records.SECAGG: ConfigRecord({"stage": "decrypt"}),
            records.MASKED: ArrayRecord({records.SUM: write_array(total)}),
        }
    )
    return Message(content, reply_to=message)


def _min_cohort(node_config: Mapping[str, object]) -> int:
    """Return the fewest vectors in a sum; refuse what only masks can promise."""
    colluders = count_setting(node_config, records.SECAGG_COLLUDERS, 0)
    unmet = [
        name
        for name in (records.SECAGG_IDENTITY, records.SECAGG_ROSTER)
        if path_setting(node_config, name) is not None
    ]
    if colluders or unmet:
        raise NodeError(
            NodeErrorCode.POLICY_REFUSED,
            f"this node insists on {unmet} and colluders={colluders}: with a key that all nodes "
            "share, no roster is kept and no colluder is withstood",
        )
    least = count_setting(node_config, records.SECAGG_MIN_COHORT, _LEAST_COHORT)
    checks.at_least(2, **{f"node config {records.SECAGG_MIN_COHORT}": least})
    return least


def _key(node_config: Mapping[str, object]) -> SecretKey:
    path = path_setting(node_config, records.CKKS_KEY)
    if path is None:
        raise ValueError(f"node config {records.CKKS_KEY} must name the file nodes.ckks")
    return SecretKey.load(Path(path))


def _take_round(context: Context) -> _Round | None:
    """Return what is kept of the round and delete it."""
    record = config_record(context.state, records.CKKS_STATE)
    if record is None:
        return None
    del context.state[records.CKKS_STATE]
    return from_config(_Round, dict(record))
