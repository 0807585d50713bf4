"""One round's exchange with the nodes, by any protocol for secure sums."""

import logging
from collections.abc import Callable, Iterable
from typing import Final, final

from flwr.app import Message, MessageType, RecordDict

from dpfl_flower.secagg import (
    LONGEST_SECONDS,
    RoundAbandoned,
    SecureAggregation,
    SecureExchange,
    SecureSum,
    SumRequest,
)
from dpfl_strategies.replies import accepted

__all__ = ["SecureRound", "no_room", "round_seconds", "unfinished"]

log = logging.getLogger("flwr.dpfl")

_STAGES: Final = 5

Admit = Callable[[Message], bool]


def round_seconds(stage_seconds: float) -> float:
    """Return how long a round may take in all, if each exchange of messages takes so long.

    >>> round_seconds(60.0)
    300.0
    """
    return min(LONGEST_SECONDS, _STAGES * stage_seconds)


def no_room(secure: SecureAggregation, *, parties: int, nodes: int) -> ValueError:
    """Return the error of a round with more nodes than the modulus leaves room for."""
    return ValueError(
        f"max_cohort={parties} must be >= {nodes}, the nodes that are registered: raise the number "
        "of nodes that the strategy was given (population or num_nodes), or give "
        f"{type(secure).__name__} a larger max_cohort, so that the modulus leaves room for all"
    )


def unfinished(server_round: int) -> RuntimeError:
    """Return the error of a loop of one's own that aggregates before the exchange has ended."""
    return RuntimeError(
        f"round {server_round} waits for further messages: send what continue_train returns until "
        "it returns None, then aggregate"
    )


def _anyone(reply: Message) -> bool:
    del reply
    return True


@final
class SecureRound:
    """Sends what the protocol wants sent, until there is a sum or the round is abandoned.

    Parameters
    ----------
    secure : SecureAggregation
    request : SumRequest
    task : RecordDict
        What the nodes that compute vectors are asked.
    admit : Callable[[Message], bool]
        Asked of each reply that brings a vector, before it is summed: False makes it a dropout.
    """

    def __init__(
        self,
        secure: SecureAggregation,
        request: SumRequest,
        task: RecordDict,
        *,
        admit: Admit = _anyone,
    ) -> None:
        self._server_round = request.session.server_round
        self._task = task
        self._admit = admit
        self._now: SecureExchange | SecureSum | None
        try:
            self._now = secure.begin(request)
        except RoundAbandoned as abandoned:
            self._abandon(abandoned)

    @property
    def finished(self) -> bool:
        """Whether nothing further is to be sent."""
        return not isinstance(self._now, SecureExchange)

    @property
    def total(self) -> SecureSum | None:
        """The sum; None where the round was abandoned, or is not finished."""
        return self._now if isinstance(self._now, SecureSum) else None

    def messages(self) -> list[Message]:
        """Return what to send now; nothing where the round is finished."""
        exchange = self._now
        if not isinstance(exchange, SecureExchange):
            return []
        messages = []
        for node, protocol in exchange.requests.items():
            content = RecordDict(dict(self._task) if exchange.carries_task else {})
            for name, record in protocol.items():
                content[name] = record
            messages.append(
                Message(content, node, MessageType.TRAIN, group_id=self._group(exchange))
            )
        return messages

    def proceed(self, replies: Iterable[Message]) -> list[Message] | None:
        """Go on from these replies; return what to send next, None where they were the last."""
        self.receive(replies)
        return None if self.finished else self.messages()

    def receive(self, replies: Iterable[Message]) -> None:
        """Go on from the replies to :meth:`messages`; whoever is missing has dropped out."""
        exchange = self._now
        if not isinstance(exchange, SecureExchange):
            return
        asked = exchange.requests.keys()
        answers = {
            message.metadata.src_node_id: message.content
            for message in accepted(replies, asked=asked, group=self._group(exchange))
            if not exchange.carries_task or self._admit(message)
        }
        try:
            self._now = exchange.receive(answers)
        except RoundAbandoned as abandoned:
            self._abandon(abandoned)

    def _group(self, exchange: SecureExchange) -> str:
        return f"{self._server_round}/{exchange.stage}"

    def _abandon(self, reason: RoundAbandoned) -> None:
        log.warning("NOT PRIVATE: round %d is abandoned: %s", self._server_round, reason)
        self._now = None
