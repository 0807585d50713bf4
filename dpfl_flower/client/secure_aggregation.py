"""The node's side of secure aggregation, as a mod around an app's train function.

>>> from flwr.clientapp import ClientApp
>>> app = ClientApp()
>>> @app.train(mods=[secure_aggregation_mod])
... def train(message: Message, context: Context) -> Message:
...     return message  # trains, and answers as it would without
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from dpfl_flower import records
from dpfl_flower.client.contribution import contribution_for
from dpfl_flower.client.errors import NodeError, NodeErrorCode, answer
from dpfl_flower.client.masked_answer import under_masks
from dpfl_flower.client.secure_node import (
    as_node_error,
    contributed,
    count_setting,
    forget_expired,
    journal_of,
    path_setting,
    remember,
)
from dpfl_flower.secagg import node
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.messages import (
    AcknowledgeRequest,
    AdvertiseRequest,
    MaskRequest,
    Reply,
    Request,
    ShareRequest,
)
from dpfl_flower.secagg.node_checks import certain_vectors
from dpfl_flower.secagg.node_state import NodeRules, NodeState, Party
from dpfl_flower.secagg.roster import Identity, Roster
from dpfl_flower.secagg.terms import terms_of
from dpfl_flower.secagg.wire import decode_request, encode, from_bytes, to_bytes
from dpfl_flower.wire import config_record

__all__ = ["rules_from_node_config", "secure_aggregation_mod"]

_STATE: Final = "state"


def secure_aggregation_mod(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Answer all stages of secure aggregation; the app is called for the masked vector only.

    Only that vector leaves: counts, weights and metrics of the app's answer stay on the node. Where
    the app adds all of its own noise (`DPSGDClient`, `local_noise_mod`), its privacy claim goes
    along in clear, and without a claim that can be read nothing leaves. A train message that is no
    stage of the protocol is refused, so that no server gets the plain answer by asking without.
    Messages of other kinds pass.

    The node's own config decides what it insists on: ``secagg-min-cohort`` (3), the fewest nodes
    that it is summed with; ``secagg-colluders`` (0); ``secagg-identity`` and ``secagg-roster``,
    files with its Ed25519 private key and the public keys of its peers; ``secagg-journal``, a file
    in which every stage is noted before it is answered, and which a roster needs. Without it, what
    has been answered is remembered in the state of the run, which a SuperNode keeps in memory and
    hands on only after the reply: a crash or a replay in between is then not noticed.

    Everything that goes wrong is logged on the node and answered with a `NodeErrorCode`.
    """
    forget_expired(context, records.SECAGG_STATE)
    if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return call_next(message, context)
    try:
        return _answer(message, context, call_next)
    except Refused as refused:
        return answer(as_node_error(refused), reply_to=message)
    except (Exception, SystemExit) as error:  # sys.exit carries text of the app's too
        return answer(error, reply_to=message)


def rules_from_node_config(node_config: Mapping[str, object]) -> NodeRules:
    """Read what a node insists on from its config; files are read anew for each message.

    Raises
    ------
    ValueError, OSError
        If a key has a value of another kind, a file is missing or damaged, or there is a roster and
        no journal.
    """
    identity = path_setting(node_config, records.SECAGG_IDENTITY)
    roster = path_setting(node_config, records.SECAGG_ROSTER)
    if roster is not None and path_setting(node_config, records.SECAGG_JOURNAL) is None:
        # A server that lies asks for a stage twice before the state of the first is kept: two lists
        # of survivors are signed, and a peer's shares of both kinds handed out.
        raise ValueError(
            f"node config {records.SECAGG_ROSTER}={roster!r} needs {records.SECAGG_JOURNAL}: "
            "without it nothing that a roster promises holds against a server that asks twice"
        )
    return NodeRules(
        min_cohort=count_setting(node_config, records.SECAGG_MIN_COHORT, NodeRules.min_cohort),
        colluders=count_setting(node_config, records.SECAGG_COLLUDERS, NodeRules.colluders),
        identity=None if identity is None else Identity.load(Path(identity)),
        roster=None if roster is None else Roster.load(Path(roster)),
    )


def _answer(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    if config_record(message.content, records.SECAGG) is None:
        raise NodeError(
            NodeErrorCode.SECAGG_REQUIRED,
            "a train message without the protocol: the strategy must have secure_aggregation=..., "
            "or the app must not have secure_aggregation_mod",
        )
    rules = rules_from_node_config(context.node_config)
    try:
        request = decode_request(message.content)
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, str(error)) from error
    journal = journal_of(context)
    journal.enter(request.server_round, request.stage)
    remember(context, journal.progress)
    # From here on the stage counts as answered, and whatever fails ends the round for this node.
    state = _take_state(context)
    content, state = _stage(request, state, rules, message, context, call_next)
    if state is not None:
        context.state[records.SECAGG_STATE] = ConfigRecord(
            {"expires": state.expires, _STATE: to_bytes(state)}
        )
    return Message(content, reply_to=message)


def _stage(
    request: Request,
    state: NodeState | None,
    rules: NodeRules,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> tuple[RecordDict, NodeState | None]:
    reply: Reply
    if isinstance(request, AdvertiseRequest):
        party = Party(run_id=context.run_id, node_id=context.node_id)
        state, reply = node.advertise(request, party, rules, now=time.time())
        return encode(reply), state
    if state is None or state.server_round != request.server_round:
        raise Refused(Refusal.OUT_OF_ORDER, "this node is not, or no longer, part of the round")
    if isinstance(request, ShareRequest):
        state, reply = node.share_keys(state, request, rules)
    elif isinstance(request, MaskRequest):
        state = node.accept_shares(state, request, rules)
        return _mask(state, rules, message, context, call_next)
    elif isinstance(request, AcknowledgeRequest):
        state, reply = node.acknowledge(state, request, rules)
    else:
        return encode(node.unmask(state, request, rules)), None
    return encode(reply), state


def _mask(
    state: NodeState,
    rules: NodeRules,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> tuple[RecordDict, NodeState]:
    if terms_of(message.content, message.metadata.message_type) != state.terms:
        raise Refused(
            Refusal.MALFORMED, "the terms of the sum are not those that the round began with"
        )
    contribution = contribution_for(
        message.content,
        context.node_config,
        width=state.width,
        bits=state.bits,
        lanes=state.lanes,
        # What the roster makes certain even if the server lies: docs/threat-model.md.
        most_survivors=None if rules.roster is None else certain_vectors(state),
    )
    # The shares of a noised sum count on each other: this node lets no smaller one be unmasked.
    state = node.count_on(state, contribution.counts_on, rules)
    with under_masks(survivors=max(rules.min_cohort, state.counted_on)):
        made = contributed(contribution, message, context, call_next, width=state.width)
    state, reply = node.mask(state, made.vector)
    return made.beside(encode(reply)), state


def _take_state(context: Context) -> NodeState | None:
    """Return the state of the round and delete it."""
    record = config_record(context.state, records.SECAGG_STATE)
    if record is None:
        return None
    del context.state[records.SECAGG_STATE]
    return from_bytes(NodeState, cast("bytes", record[_STATE]))
