"""A Flower Grid whose ClientApps run in worker processes of their own.

A node always goes to the same worker, which keeps its context and whatever its ClientApp holds in
the process. The global arrays are written once a round into memory that the workers share. What a
strategy can tell is the same as from the in-process grid, and the same results come back in the
same order. When a worker dies, its nodes are unavailable from then on; nobody waits for them.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Final, Self, final

from flwr.app import Message

from dpfl_flower import checks
from dpfl_flower.simulation.local_grid import Fault, LocalGrid, NodeConfig
from dpfl_flower.simulation.shared_bytes import SharedMemory, Shipment
from dpfl_flower.simulation.worker import LoadClient, Said, Task

__all__ = ["WorkerGrid"]

log = logging.getLogger("flwr.dpfl")

_MAIN: Final = "from dpfl_flower.simulation.worker import main; main()"
_LAST_WORDS_SECONDS: Final = 2.0
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class _Outcome:
    """What became of an order: a pickled reply, None where its worker is dead or did not begin."""

    order: "_Order"
    reply: bytes | None
    said: Said | None


@dataclass(frozen=True)
class _Order:
    """A message for a worker."""

    message_id: str
    task: Task
    shipment: Shipment


@final
class WorkerGrid(LocalGrid):
    """Answers messages in ``num_workers`` processes, each with one computing thread.

    A context manager: the processes start with the block and end with it.

    Parameters
    ----------
    load_client
        Returns the ClientApp; called once in each worker. It is pickled: a function of a module
        that workers can import, or a ``functools.partial`` of one.
    num_workers
        Processes; node ``i`` lives in worker ``i % num_workers``. No more than nodes are started.
    num_supernodes, run_config, node_configs, fault
        As for :class:`~dpfl_flower.simulation.in_process.InProcessGrid`.

    Raises
    ------
    RuntimeError
        On entering, when a worker cannot load the ClientApp; says why.
    """

    def __init__(
        self,
        load_client: LoadClient,
        *,
        num_workers: int,
        num_supernodes: int,
        run_config: NodeConfig | None = None,
        node_configs: Sequence[NodeConfig] | None = None,
        fault: Callable[[Message], Fault | None] | None = None,
    ) -> None:
        checks.positive_int(num_workers=num_workers)
        super().__init__(
            num_supernodes=num_supernodes,
            run_config=run_config,
            node_configs=node_configs,
            fault=fault,
        )
        self._load_client = load_client
        self._num_workers = min(num_workers, num_supernodes)
        self._worker_of: dict[int, _WorkerProcess] = {}
        self._waiting: dict[str, Message] = {}
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._processes = contextlib.ExitStack()
        self._memory: SharedMemory | None = None

    def __enter__(self) -> Self:
        """Start the workers, and let messages made from here on come from this run's server."""
        with contextlib.ExitStack() as starting:
            memory = starting.enter_context(contextlib.closing(SharedMemory()))
            contexts = list(self._contexts.values())
            workers = []
            for i in range(self._num_workers):
                mine = contexts[i :: self._num_workers]
                start = pickle.dumps((self._load_client, mine, self._run.run_id))
                worker = _WorkerProcess(start, memory, self._waiting, self._outcomes)
                workers.append(starting.enter_context(contextlib.closing(worker)))
                self._worker_of |= {context.node_id: worker for context in mine}
            for worker in workers:
                worker.wait_until_ready()
            super().__enter__()
            self._memory = memory
            self._processes = starting.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the workers, busy or not, and give the process its identity back."""
        super().__exit__(kind, error, traceback)
        self._memory = None
        self._processes.close()

    @property
    def worker_pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.pid for worker in dict.fromkeys(self._worker_of.values())]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that there are by now, each once."""
        self._take_all()
        return super().pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that come within ``timeout`` seconds; later ones are never looked at.

        Without ``timeout`` it waits for every worker that is alive.
        """
        end = None if timeout is None else time.monotonic() + timeout
        ids = list(self.push_messages(messages))
        while any(message_id in self._waiting for message_id in ids):
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                self._take(self._outcomes.get(timeout=left))
            except queue.Empty:
                for message_id in ids:  # one that no worker has begun is not begun any more
                    self._waiting.pop(message_id, None)
        return super().pull_messages(ids)

    def _deliver(self, messages: Sequence[Message]) -> None:
        if self._memory is None:
            raise RuntimeError("the workers run inside of the grid's with block only")
        if not messages:
            return
        self._take_all()  # which frees memory
        shipment = self._memory.ship(messages)
        for message, pickled in zip(messages, shipment.pickles, strict=True):
            message_id = message.metadata.message_id
            self._waiting[message_id] = message
            task = Task(shipment.number, shipment.start, pickled)
            worker = self._worker_of[message.metadata.dst_node_id]
            worker.orders.put(_Order(message_id, task, shipment))

    def _take_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._outcomes.get_nowait())

    def _take(self, outcome: _Outcome) -> None:
        outcome.order.shipment.done_with_one()
        message_id = outcome.order.message_id
        if outcome.said is not None:
            _say_again(outcome.said)
        message = self._waiting.pop(message_id, None)
        if message is None:
            return  # it came too late
        if outcome.reply is None:
            log.warning(
                "Node %d is unavailable: its worker process ended", message.metadata.dst_node_id
            )
            self._keep(message_id, self._unavailable(message))
            return
        reply: Message = pickle.loads(outcome.reply)  # noqa: S301 - from a process we started
        self.answered += reply.has_content()
        self._keep(message_id, reply)


@final
class _WorkerProcess:
    """A worker's process, and the thread that talks to it: one message, one reply."""

    def __init__(
        self,
        start: bytes,
        memory: SharedMemory,
        waiting: dict[str, Message],
        outcomes: "queue.SimpleQueue[_Outcome]",
    ) -> None:
        self.orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._start = start
        self._waiting = waiting
        self._outcomes = outcomes
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _MAIN),
                    *(str(theirs.fileno()), str(memory.fileno())),
                ],
                pass_fds=(theirs.fileno(), memory.fileno()),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what bypasses Python's print must not mix with this process's results
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the rest
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._threads = [
            threading.Thread(target=self._talk, daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]
        self._threads[1].start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the ClientApp is loaded; raise RuntimeError when it cannot be."""
        levels = {name: logging.getLogger(name).level for name in ("", "flwr")}
        try:
            self._connection.send_bytes(pickle.dumps((levels, self._start)))
            problem, said = self._connection.recv()
        except (EOFError, OSError):
            problem, said = f"it ended with status {self._process.wait()}", Said([], "")
        _say_again(said)
        if problem:
            raise RuntimeError(f"a worker process cannot load the ClientApp: {problem}")
        self._threads[0].start()

    def close(self) -> None:
        """End the process, busy or not."""
        self.orders.put(None)
        self._hang_up()
        try:
            self._process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._connection.close()
        self._socket.close()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _watch(self) -> None:
        """Hang up when the process is gone: its own children might still hold the other end."""
        self._process.wait()
        self._hang_up()

    def _talk(self) -> None:
        alive = True
        while (order := self.orders.get()) is not None:
            answered: tuple[bytes | None, Said | None] = (None, None)
            # Where the time is up nobody waits any more, so it need not begin.
            if alive and order.message_id in self._waiting:
                try:
                    self._connection.send(order.task)
                    answered = self._connection.recv()
                except (EOFError, OSError):
                    alive = False
            self._outcomes.put(_Outcome(order, *answered))


def _say_again(said: Said) -> None:
    """Log and print here what a worker logged and printed."""
    for record in said.records:
        logging.getLogger(record.name).handle(record)
    if said.printed:
        sys.stdout.write(said.printed)


def _environment() -> dict[str, str]:
    paths: list[Any] = [path or str(os.getcwd()) for path in sys.path]  # noqa: PTH109
    return {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": os.pathsep.join(paths)}
