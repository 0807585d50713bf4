"""Nodes in worker processes answer as in this one, and a process that dies is a dropout."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.simulation import Fault, InProcessGrid, WorkerGrid
from dpfl_strategies import DPFedAvg
from tests.support import worker_clients

LARGE = 50_000  # 200 kB, which go through shared memory


@contextmanager
def workers(num_workers: int, nodes: int, **settings: object) -> Iterator[WorkerGrid]:
    before = shared_memory()
    with WorkerGrid(
        settings.pop("load", worker_clients.load),
        num_workers=num_workers,
        num_supernodes=nodes,
        run_config={"setting": 3},
        **settings,
    ) as grid:
        pids = grid.worker_pids
        assert len(pids) == min(num_workers, nodes)
        yield grid
    for pid in pids:  # reaped, so not even a zombie has this id
        assert not Path(f"/proc/{pid}").exists()
    assert shared_memory() == before


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def ask(grid, *, arrays: ArrayRecord | None = None, timeout: float | None = 60) -> list[Message]:
    content = RecordDict({"arrays": arrays or worker_clients.zeros(LARGE)})
    messages = [Message(content, node, "train", group_id="1") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=timeout))


def numbers(replies: list[Message], key: str) -> list[int]:
    return [int(reply.content["metrics"][key]) for reply in replies]


def test_every_node_answers_for_itself_and_always_in_the_same_worker() -> None:
    with workers(2, 5, load=worker_clients.load_with_torch) as grid:
        replies = ask(grid)
        assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
        assert numbers(replies, "partition") == [0, 1, 2, 3, 4]
        assert set(numbers(replies, "setting")) == {3}
        assert set(numbers(replies, "threads")) == {1}
        assert {reply.metadata.group_id for reply in replies} == {"1"}
        assert len({reply.metadata.message_id for reply in replies} - {""}) == 5
        first, second = grid.worker_pids
        assert numbers(replies, "pid") == [first, second, first, second, first]
        again = ask(grid)
        assert numbers(again, "pid") == numbers(replies, "pid")
        assert numbers(again, "calls") == [2] * 5  # each kept its own context
        assert (grid.delivered, grid.answered) == (10, 10)

        # What is sent stays as it is, and large arrays arrive whole.
        rng = np.random.default_rng(0)
        arrays = ArrayRecord({"a": worker_clients.Array(rng.normal(size=300_000))})
        sent = arrays["a"].numpy().copy()
        for number, reply in enumerate(ask(grid, arrays=arrays)):
            found = reply.content["arrays"]["a"].numpy()
            np.testing.assert_array_equal(found, sent + (number + 1 - sent) / 8)
        np.testing.assert_array_equal(arrays["a"].numpy(), sent)

        # Memory is used again once a round is over.
        size = os.fstat(grid._memory.fileno()).st_size
        for _ in range(3):
            ask(grid, arrays=arrays)
        assert 8 * 300_000 <= os.fstat(grid._memory.fileno()).st_size == size


def released(grid) -> np.ndarray:
    strategy = DPFedAvg(
        sampling=EveryoneSampling(3),
        clipping=FixedClipping(50.0),
        noise_multiplier=0.5,
        noise_seed=7,
    )
    result = strategy.start(grid, worker_clients.zeros(LARGE), num_rounds=3)
    assert result.rounds == 3
    return np.asarray(result.arrays["a"].numpy())


def test_one_worker_two_workers_and_this_process_release_the_same_to_the_last_bit() -> None:
    settings = {"num_supernodes": 3, "run_config": {"setting": 3}}
    with InProcessGrid(worker_clients.app, **settings) as grid:
        expected = released(grid)
    assert np.any(expected != 0)
    for num_workers in (1, 2):
        with workers(num_workers, 3) as grid:
            np.testing.assert_array_equal(released(grid), expected)


def test_a_client_that_raises_answers_flowers_error_and_forgets() -> None:
    configs = [{}, {"mode": "raises", "from-call": 2}, {"mode": "unpicklable"}]
    with workers(2, 3, node_configs=configs) as grid:
        assert [reply.has_error() for reply in ask(grid)] == [False, False, True]
        for _ in range(2):
            fine, failed, unpicklable = ask(grid)
            assert not fine.has_error()
            assert failed.error.code == 2  # CLIENT_APP_RAISED_EXCEPTION
            assert failed.error.reason == "<class 'RuntimeError'>:<'planted'>"
            assert failed.metadata.src_node_id == 1001
            assert unpicklable.error.code == 2


def test_injected_faults_are_those_of_the_in_process_grid() -> None:
    faults = {1000: Fault.SILENT, 1001: Fault.UNREACHABLE}
    with workers(2, 3, fault=lambda m: faults.get(m.metadata.dst_node_id)) as grid:
        unreachable, fine = ask(grid, timeout=None)  # nobody waits for the silent one
        assert unreachable.error.code == 5  # NODE_UNAVAILABLE
        assert (unreachable.metadata.src_node_id, fine.metadata.src_node_id) == (1001, 1002)


def test_a_worker_that_dies_takes_its_nodes_out_and_nobody_waits() -> None:
    # Nodes 0 and 2 live with the one that dies in its second call; a child of it lives on.
    configs = [{}, {}, {"mode": "dies", "from-call": 2}, {}]
    with workers(2, 4, node_configs=configs) as grid:
        assert not any(reply.has_error() for reply in ask(grid))
        for round_ in (2, 3):
            replies = ask(grid, timeout=None)
            codes = [reply.error.code if reply.has_error() else 0 for reply in replies]
            assert codes == ([0, 0, 5, 0] if round_ == 2 else [5, 0, 5, 0])
            assert [reply.metadata.src_node_id for reply in replies] == [1000, 1001, 1002, 1003]


def test_a_killed_worker_is_a_dropout_for_the_strategy() -> None:
    with workers(2, 3) as grid:
        os.kill(grid.worker_pids[1], signal.SIGKILL)
        strategy = DPFedAvg(
            sampling=EveryoneSampling(3), clipping=FixedClipping(1e4), noise_multiplier=0.0
        )
        result = strategy.start(grid, worker_clients.zeros(LARGE), num_rounds=1)
        # Nodes 0 and 2 move by 1/8 and 3/8; the sum is divided by the expected three.
        moved = result.arrays["a"].numpy()
        np.testing.assert_allclose(moved, (1 + 3) / 8 / 3, rtol=1e-3)


def test_a_reply_that_comes_too_late_is_never_looked_at() -> None:
    configs = [{}, {"mode": "sleeps", "from-call": 2}]
    with workers(2, 2, node_configs=configs) as grid:
        assert len(ask(grid)) == 2
        began = time.monotonic()
        for _ in range(3):
            assert [reply.metadata.src_node_id for reply in ask(grid, timeout=0.5)] == [1000]
        assert time.monotonic() - began < 60  # a node that sleeps for 600 seconds holds nobody up
        # What was never begun does not hold on to memory: the file does not grow with rounds.
        assert os.fstat(grid._memory.fileno()).st_size < 4 * 4 * LARGE


def test_what_nodes_log_and_print_shows_here(caplog, capsys) -> None:
    with workers(1, 2, node_configs=[{}, {"mode": "talks"}]) as grid, caplog.at_level(0):
        ask(grid)
    assert capsys.readouterr().out == "node 1 prints\n"
    records = [r for r in caplog.records if r.name in {"flwr.tests", "dpfl_flower.node"}]
    assert [(r.levelno, r.getMessage()) for r in records] == [
        (logging.WARNING, "node 1 says"),
        (logging.ERROR, "node 1 fails"),
    ]
    assert records[1].exc_text.endswith("KeyError: 'detail'")


def test_replies_may_be_pulled_later() -> None:
    with workers(1, 2) as grid:
        content = RecordDict({"arrays": worker_clients.zeros(3)})
        ids = list(grid.push_messages([Message(content, n, "train") for n in (1000, 1001)]))
        found: list[Message] = []
        while len(found) < 2:
            found += grid.pull_messages(ids)
            time.sleep(0.01)
        assert list(grid.pull_messages(ids)) == []


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (worker_clients.cannot_load, "ImportError: there is no such client"),
        (worker_clients.dies_loading, "it ended with status 3"),
    ],
)
def test_a_client_that_cannot_be_loaded_is_said_at_once(load, why) -> None:
    with pytest.raises(RuntimeError, match=f"cannot load the ClientApp: {why}"):
        WorkerGrid(load, num_workers=2, num_supernodes=2).__enter__()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers=0 must be an integer >= 1"):
        WorkerGrid(worker_clients.load, num_workers=0, num_supernodes=1)
    idle = WorkerGrid(worker_clients.load, num_workers=1, num_supernodes=1)
    with InProcessGrid(worker_clients.app, num_supernodes=1) as grid:
        message = Message(RecordDict(), 1000, "train")
        assert grid.run
    with pytest.raises(RuntimeError, match="inside of the grid's with block"):
        idle.push_messages([message])
