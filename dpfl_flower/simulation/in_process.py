"""A Flower Grid that calls the ClientApp in this process: no Ray, no sockets, no waiting.

It runs unmodified strategies and ClientApps. What a strategy can tell from Flower's own grid stays
the same: a client that raises answers an error, works on copies of what it was sent and loses the
changes it made to its context; an unreachable node answers Flower's error; a node that stays
silent is missing from the replies.

>>> from flwr.clientapp import ClientApp
>>> app = ClientApp()
>>> @app.query()
... def whoami(message: Message, context: Context) -> Message:
...     return Message(RecordDict(), reply_to=message)
>>> with InProcessGrid(app, num_supernodes=2) as grid:
...     asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
...     [reply.metadata.src_node_id for reply in grid.send_and_receive(asked)]
[1000, 1001]
"""

import contextlib
import copy
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Final, Self, final

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import checks
from dpfl_flower._flower import ErrorCode, Run, acting_as, assign_message_id

__all__ = ["Fault", "InProcessGrid", "NodeConfig"]

NodeConfig = Mapping[str, bool | int | float | str]
"""What ``flower-supernode --node-config`` sets."""

_SERVER: Final = 1
_FIRST_NODE: Final = 1000


class Fault(StrEnum):
    """What befalls a message that does not reach its ClientApp."""

    SILENT = "silent"
    """No reply ever comes; Flower's grid returns without it when the time is up."""
    UNREACHABLE = "unreachable"
    """Flower answers in the node's place that it is unavailable."""


@final
class InProcessGrid(Grid):
    """Answers each message by calling the ClientApp, one node after the other.

    A context manager, so that messages made inside belong to its run: Flower keeps the identity of
    whoever makes a message for the whole process. One thread may use it.

    Parameters
    ----------
    client_app
        The ClientApp that every node runs, or whatever answers messages as one does.
    num_supernodes
        Nodes; node ``i`` has the id ``1000 + i``.
    run_config
        What the app's pyproject.toml and ``--run-config`` hold.
    node_configs
        One per node, over Flower's ``partition-id`` and ``num-partitions``.
    fault
        Called with each message; tells what befalls it, None where it arrives.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        *,
        num_supernodes: int,
        run_config: NodeConfig | None = None,
        node_configs: Sequence[NodeConfig] | None = None,
        fault: Callable[[Message], Fault | None] | None = None,
    ) -> None:
        checks.positive_int(num_supernodes=num_supernodes)
        if node_configs is not None and len(node_configs) != num_supernodes:
            raise ValueError(f"node_configs holds {len(node_configs)}, not {num_supernodes}")
        self._client_app = client_app
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
        """Have every message answered; return their ids."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that there are, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies of all nodes that are not silent.

        ``timeout`` changes nothing: every reply is there once its message has been pushed, and for
        the others it would be no use to wait.
        """
        return self.pull_messages(self.push_messages(messages))

    def _push(self, message: Message) -> str:
        message_id = assign_message_id(message)
        node_id = message.metadata.dst_node_id
        if node_id not in self._contexts:
            raise ValueError(f"dst_node_id={node_id!r} must be one of {list(self._contexts)}")
        fault = self._fault(message)
        if fault is not Fault.SILENT:
            with acting_as(node_id, run_id=self._run.run_id):
                reply = self._answer(message, fault)
            assign_message_id(reply)
            self._replies[message_id] = reply
        return message_id

    def _answer(self, message: Message, fault: Fault | None) -> Message:
        if fault is Fault.UNREACHABLE:
            error = Error(ErrorCode.NODE_UNAVAILABLE, "Error: Node unavailable")
            return Message(error, reply_to=message)
        node_id = message.metadata.dst_node_id
        # Between processes everything is copied: neither side sees what the other changes later.
        received, context = copy.deepcopy((message, self._contexts[node_id]))
        try:
            reply = copy.deepcopy(self._client_app(received, context))
        except Exception as raised:
            reason = f"{type(raised)}:<'{raised}'>"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(error, reply_to=message)
        self._contexts[node_id] = context
        return reply
