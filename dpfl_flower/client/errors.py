"""What a node answers when it cannot or will not do what it was asked.

An exception may quote a record, and Flower would send its text to the server. So a node answers
with a number and a sentence that were fixed before it saw any data; the details stay in its own
log, under the logger ``dpfl_flower.node``.

>>> NodeErrorCode.BUDGET_EXHAUSTED.to_error()
Error(code=111, reason='BUDGET_EXHAUSTED: the privacy budget of this data set is spent.')
"""

import functools
import logging
from enum import IntEnum
from typing import Final

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

NODE_LOGGER: Final = "dpfl_flower.node"
"""The node's own log: what it says may describe private data and must stay on the node."""

logger = logging.getLogger(NODE_LOGGER)


class NodeErrorCode(IntEnum):
    """The codes a node answers with; Flower's own end below 100."""

    CLIENT_FAILED = 100
    MALFORMED_REQUEST = 101
    MALFORMED_REPLY = 102
    NOT_IMPLEMENTED = 103
    POLICY_REFUSED = 110
    BUDGET_EXHAUSTED = 111
    LEDGER_REFUSED = 112
    MODEL_REFUSED = 113
    SECAGG_TOO_FEW_NODES = 120
    SECAGG_THRESHOLD_TOO_LOW = 121
    SECAGG_PEER_KEY_CHANGED = 122
    SECAGG_SURVIVOR_AND_DROPPED = 123
    SECAGG_ALREADY_UNMASKED = 124
    SECAGG_REPLAYED = 125
    SECAGG_OUT_OF_ORDER = 126
    SECAGG_UNCONFIRMED = 127
    SECAGG_JOURNAL = 128
    SECAGG_REQUIRED = 129
    SECAGG_KEY = 130

    @property
    def reason(self) -> str:
        """The sentence that goes with the code, the same on every node and for all data."""
        return f"{self.name}: {_REASONS[self]}"

    def to_error(self) -> Error:
        """Build the Flower error that carries this code and nothing else."""
        return Error(code=int(self), reason=self.reason)


_REASONS: Final = {
    NodeErrorCode.CLIENT_FAILED: "the client failed; the node's own log says why.",
    NodeErrorCode.MALFORMED_REQUEST: "the request does not hold the records this client expects.",
    NodeErrorCode.MALFORMED_REPLY: "the client returned what the request's arrays cannot hold.",
    NodeErrorCode.NOT_IMPLEMENTED: "the client does not implement this kind of message.",
    NodeErrorCode.POLICY_REFUSED: (
        "the training asked for is below this node's own privacy policy, or comes without a plan "
        "for the noise that this node adds."
    ),
    NodeErrorCode.BUDGET_EXHAUSTED: "the privacy budget of this data set is spent.",
    NodeErrorCode.LEDGER_REFUSED: "the node's privacy ledger refused; its own log says why.",
    NodeErrorCode.MODEL_REFUSED: (
        "the model mixes the records of a batch or keeps statistics of them; "
        "opacus.validators.ModuleValidator.fix replaces BatchNorm with GroupNorm."
    ),
    NodeErrorCode.SECAGG_TOO_FEW_NODES: (
        "fewer nodes than this node's minimum cohort, secagg-min-cohort in its node config."
    ),
    NodeErrorCode.SECAGG_THRESHOLD_TOO_LOW: (
        "twice the threshold must exceed the neighbours and the colluders among them."
    ),
    NodeErrorCode.SECAGG_PEER_KEY_CHANGED: "a peer's key changed, or is another's.",
    NodeErrorCode.SECAGG_SURVIVOR_AND_DROPPED: "a peer is named as survivor and as dropped.",
    NodeErrorCode.SECAGG_ALREADY_UNMASKED: "this round was unmasked already.",
    NodeErrorCode.SECAGG_REPLAYED: "this stage was answered already, or the round is over.",
    NodeErrorCode.SECAGG_OUT_OF_ORDER: "the stage before this one is missing, or its time is up.",
    NodeErrorCode.SECAGG_UNCONFIRMED: (
        "too few peers on this node's roster confirm that it counts as a survivor."
    ),
    NodeErrorCode.SECAGG_JOURNAL: "the node's journal refused; its own log says why.",
    NodeErrorCode.SECAGG_REQUIRED: (
        "this app answers to secure aggregation only: the strategy needs secure_aggregation=..., "
        "and secure_aggregation_mod must be first in the app's mods."
    ),
    NodeErrorCode.SECAGG_KEY: "the server names another encryption key than this node's.",
}


class NodeError(RuntimeError):
    """A failure that has a code of its own.

    Parameters
    ----------
    code : NodeErrorCode
        What the server is told.
    detail : str
        What only the node's log is told.
    """

    def __init__(self, code: NodeErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = NodeErrorCode(code)


class ModelRefused(NodeError, ValueError):
    """The model's gradients are not one per record, or it remembers records in buffers."""

    def __init__(self, detail: str) -> None:
        super().__init__(NodeErrorCode.MODEL_REFUSED, detail)


def answer(error: BaseException, *, reply_to: Message) -> Message:
    """Log ``error`` on this node and answer ``reply_to`` with a fixed code."""
    code = error.code if isinstance(error, NodeError) else NodeErrorCode.CLIENT_FAILED
    logger.error(
        "Answering %s to a %r message", code.name, reply_to.metadata.message_type, exc_info=error
    )
    return Message(code.to_error(), reply_to=reply_to)


def app_failed(code: int) -> NodeError:
    """Return the error for an app that answered error ``code``: its own code, where that is ours.

    Nothing else of what it answered leaves: the reason is the app's own text.
    """
    known = {int(one) for one in NodeErrorCode}
    return NodeError(
        NodeErrorCode(code) if code in known else NodeErrorCode.CLIENT_FAILED,
        f"the app answered error code {code}",
    )


def guarded(function: ClientAppCallable) -> ClientAppCallable:
    """Let nothing of an exception leave the node.

    Put it below ``@app.train()``, ``@app.evaluate()`` or ``@app.query()``. An exception is logged
    on the node and answered with a `NodeErrorCode`; its text, type and traceback stay.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp()
    >>> @app.train()
    ... @guarded
    ... def train(message: Message, context: Context) -> Message:
    ...     raise ValueError("patient 4711 has no age")
    """

    @functools.wraps(function)
    def without_details(message: Message, context: Context) -> Message:
        try:
            return function(message, context)
        except (Exception, SystemExit) as error:  # sys.exit carries text of the app's too
            return answer(error, reply_to=message)

    return without_details


def guard_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Guard as `guarded` does, as a Flower mod: first in the list, it guards the mods after it."""
    return guarded(call_next)(message, context)
