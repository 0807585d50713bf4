"""A Flower Grid that calls the ClientApp in this process: no Ray, no sockets, no waiting.

It runs unmodified strategies and ClientApps. What a strategy can tell from Flower's own grid stays
the same: a client that raises answers an error, works on copies of what it was sent and loses the
changes it made to its context; an unreachable node answers Flower's error; a node that stays
silent is missing from the replies.

>>> from flwr.app import Context, Message, RecordDict
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

from collections.abc import Callable, Iterable, Sequence
from typing import final

from flwr.app import Message

from dpfl_flower.simulation.copies import copied_message
from dpfl_flower.simulation.local_grid import Answering, Fault, LocalGrid, NodeConfig, answer

__all__ = ["Fault", "InProcessGrid", "NodeConfig"]


@final
class InProcessGrid(LocalGrid):
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
        client_app: Answering,
        *,
        num_supernodes: int,
        run_config: NodeConfig | None = None,
        node_configs: Sequence[NodeConfig] | None = None,
        fault: Callable[[Message], Fault | None] | None = None,
    ) -> None:
        super().__init__(
            num_supernodes=num_supernodes,
            run_config=run_config,
            node_configs=node_configs,
            fault=fault,
        )
        self._client_app = client_app

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies of all nodes that are not silent.

        ``timeout`` changes nothing: every reply is there once its message has been pushed, and for
        the others it would be no use to wait.
        """
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._keep(message.metadata.message_id, self._answered(message))

    def _answered(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        # Between processes everything is copied: neither side sees what the other changes later.
        reply, self._contexts[node_id] = answer(
            self._client_app,
            copied_message(message),
            self._contexts[node_id],
            run_id=self._run.run_id,
        )
        self.answered += reply.has_content()
        return copied_message(reply)
