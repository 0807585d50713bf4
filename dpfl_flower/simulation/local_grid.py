"""What a Flower Grid on this machine is, wherever its ClientApps run.

>>> Fault("silent") is Fault.SILENT
True
"""

import contextlib
import logging
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import checks
from dpfl_flower._flower import ErrorCode, Run, acting_as, assign_message_id
from dpfl_flower.simulation.copies import copied_context

__all__ = ["Answering", "Fault", "LocalGrid", "NodeConfig", "answer", "failed"]

# client.errors.NODE_LOGGER, which no layer here may import.
logger = logging.getLogger("dpfl_flower.node")

NodeConfig = Mapping[str, bool | int | float | str]
"""What ``flower-supernode --node-config`` sets."""

Answering = Callable[[Message, Context], Message]
"""A ClientApp, or whatever answers messages as one does."""

_SERVER: Final = 1
_FIRST_NODE: Final = 1000


class Fault(StrEnum):
    """What befalls a message that does not reach its ClientApp."""

    SILENT = "silent"
    """No reply ever comes; Flower's grid returns without it when the time is up."""
    UNREACHABLE = "unreachable"
    """Flower answers in the node's place that it is unavailable."""


def answer(
    client_app: Answering, message: Message, context: Context, *, run_id: int
) -> tuple[Message, Context]:
    """Return a node's reply and the context that it goes on with.

    ``message`` is the node's own, which may write over it; ``context`` stays as it is. A client
    that raises answers Flower's error and loses what it changed.
    """
    mine = copied_context(context)
    with acting_as(context.node_id, run_id=run_id):
        try:
            return client_app(message, mine), mine
        except Exception as raised:
            return failed(message, raised), context


def failed(message: Message, raised: Exception) -> Message:
    """Return what Flower answers when a ClientApp raises; log it on the node, as it does."""
    logger.error(
        "ClientApp of node %d raised an exception", message.metadata.dst_node_id, exc_info=raised
    )
    reason = f"{type(raised)}:<'{raised}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class LocalGrid(Grid):
    """Nodes with the ids 1000, 1001, ..., and the replies that wait to be pulled.

    A context manager, so that messages made inside belong to its run: Flower keeps the identity of
    whoever makes a message for the whole process. One thread may use it.

    Parameters
    ----------
    num_supernodes, run_config, node_configs, fault
        As for :class:`~dpfl_flower.simulation.in_process.InProcessGrid`.

    Attributes
    ----------
    delivered : int
        Messages that reached a ClientApp.
    answered : int
        Those that it answered by something else than an error.
    """

    def __init__(
        self,
        *,
        num_supernodes: int,
        run_config: NodeConfig | None = None,
        node_configs: Sequence[NodeConfig] | None = None,
        fault: Callable[[Message], Fault | None] | None = None,
    ) -> None:
        checks.positive_int(num_supernodes=num_supernodes)
        if node_configs is not None and len(node_configs) != num_supernodes:
            raise ValueError(f"node_configs holds {len(node_configs)}, not {num_supernodes}")
        self._fault = fault or (lambda message: None)
        # Random, as Flower's: a node's ledger keeps one plan for each run id.
        self._run = Run.create_empty(run_id=1 + secrets.randbelow(2**63 - 1))
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=self._run.run_id,
                node_id=_FIRST_NODE + i,
                node_config={
                    "partition-id": i,
                    "num-partitions": num_supernodes,
                    **(node_configs[i] if node_configs else {}),
                },
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i in range(num_supernodes)
        }
        self._replies: dict[str, Message] = {}
        self._identity = contextlib.ExitStack()
        self.delivered = self.answered = 0

    def __enter__(self) -> Self:
        """Let messages made from here on come from this run's server."""
        self._identity.enter_context(acting_as(_SERVER, run_id=self._run.run_id))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the process its identity back."""
        self._identity.close()

    def set_run(self, run: Run) -> None:
        """Set the run whose messages these are."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run whose messages these are."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; Flower keeps this for older apps."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send every message; return their ids."""
        ids, sent = [], []
        for message in messages:
            ids.append(assign_message_id(message))
            node_id = message.metadata.dst_node_id
            if node_id not in self._contexts:
                raise ValueError(f"dst_node_id={node_id!r} must be one of {list(self._contexts)}")
            fault = self._fault(message)
            if fault is Fault.UNREACHABLE:
                self._keep(ids[-1], self._unavailable(message))
            elif fault is None:
                sent.append(message)
        self.delivered += len(sent)
        self._deliver(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that there are, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    @abstractmethod
    def _deliver(self, messages: Sequence[Message]) -> None:
        """Let the nodes answer, now or later; each reply is handed to ``_keep``."""

    def _unavailable(self, message: Message) -> Message:
        """Return what Flower answers in the place of a node that is not there."""
        error = Error(ErrorCode.NODE_UNAVAILABLE, "Error: Node unavailable")
        with acting_as(message.metadata.dst_node_id, run_id=self._run.run_id):
            return Message(error, reply_to=message)

    def _keep(self, message_id: str, reply: Message) -> None:
        """Keep a reply until it is pulled."""
        assign_message_id(reply)
        self._replies[message_id] = reply
