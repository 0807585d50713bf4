"""A worker process of a :class:`~dpfl_flower.simulation.workers.WorkerGrid`: some nodes, for good.

What its nodes log and print goes to the process that asked, together with the reply, so that it is
shown and written down there as if they ran in it.

>>> worker = Worker(lambda: print, [], run_id=1)
>>> worker.client_app is print
True
"""

import contextlib
import io
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, final

from flwr.app import Context, Message

from dpfl_flower.simulation.local_grid import Answering, answer, failed
from dpfl_flower.simulation.shared_bytes import Reader

__all__ = ["LoadClient", "Said", "Task", "Worker", "main"]

LoadClient = Callable[[], Answering]
"""Returns the ClientApp; pickled, so a function of an importable module or a partial of one."""

_FORMATTER: Final = logging.Formatter()


@dataclass(frozen=True)
class Task:
    """A message for a node of this worker, as `SharedMemory.ship` wrapped it."""

    shipment: int
    start: int
    pickled: bytes


@dataclass(frozen=True)
class Said:
    """What was logged and printed meanwhile."""

    records: Sequence[logging.LogRecord]
    printed: str


@final
class Worker:
    """Some nodes, their ClientApp and their contexts.

    Parameters
    ----------
    load_client : callable
    contexts : sequence of Context
        Of the nodes that live here.
    run_id : int
    """

    def __init__(self, load_client: LoadClient, contexts: Sequence[Context], run_id: int) -> None:
        self.client_app = load_client()
        self._contexts = {context.node_id: context for context in contexts}
        self._run_id = run_id

    def answer(self, message: Message) -> bytes:
        """Return the pickled reply of the node that the message is for."""
        node_id = message.metadata.dst_node_id
        reply, context = answer(
            self.client_app, message, self._contexts[node_id], run_id=self._run_id
        )
        try:
            pickled = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as raised:
            return pickle.dumps(failed(message, raised))
        self._contexts[node_id] = context
        return pickled


class _Relay(logging.Handler):
    """Collects records in a form that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = _FORMATTER.formatException(record.exc_info)
            record.exc_info = None
        self.records.append(record)

    def take(self) -> list[logging.LogRecord]:
        taken, self.records = self.records, []
        return taken


def main() -> None:
    """Answer messages until the other side hangs up."""
    connection, reader = Connection(int(sys.argv[1])), Reader(int(sys.argv[2]))
    relay = _relay()
    printed = io.StringIO()

    def said() -> Said:
        text = printed.getvalue()
        printed.seek(0)
        printed.truncate()
        return Said(relay.take(), text)

    with contextlib.suppress(EOFError, ConnectionError), contextlib.redirect_stdout(printed):
        levels, start = pickle.loads(connection.recv_bytes())  # noqa: S301 - from whoever started us
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        try:
            worker = Worker(*pickle.loads(start))  # noqa: S301
            if (torch := sys.modules.get("torch")) is not None:
                torch.set_num_threads(1)  # the processes share the cores
        except Exception as raised:
            connection.send((f"{type(raised).__name__}: {raised}", said()))
            return
        connection.send(("", said()))
        while True:
            task: Task = connection.recv()
            reply = worker.answer(reader.read(task.shipment, task.start, task.pickled))
            connection.send((reply, said()))


def _relay() -> _Relay:
    relay = _Relay()
    flower, root = logging.getLogger("flwr"), logging.getLogger()
    flower.handlers, flower.propagate, root.handlers = [relay], False, [relay]
    return relay
