"""A strategy cannot tell the in-process grid from Flower's by what comes back."""

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower._flower import TaskIdentity
from dpfl_flower.client import NODE_LOGGER
from dpfl_flower.simulation import Fault, InProcessGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Count calls in the context, write over what was sent, fail where the node config says so."""
    calls = int(context.state.metric_records.get("calls", MetricRecord({"n": 0}))["n"]) + 1
    context.state["calls"] = MetricRecord({"n": calls})
    message.content["arrays"]["a"] = Array(np.full(2, 7.0))
    if context.node_config.get("fail"):
        raise RuntimeError("planted")
    numbers = {
        "calls": calls,
        "partition": int(context.node_config["partition-id"]),
        "setting": int(context.run_config["setting"]),
    }
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


def grid_of(nodes: int, **settings: object) -> InProcessGrid:
    return InProcessGrid(app, num_supernodes=nodes, run_config={"setting": 3}, **settings)


@pytest.fixture
def grid() -> Iterator[InProcessGrid]:
    with grid_of(3) as grid:
        yield grid


def ask(grid: InProcessGrid, content: RecordDict | None = None) -> list[Message]:
    content = content or RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(2))})})
    messages = [Message(content, node, "train", group_id="1") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=3600))


def test_every_node_answers_for_itself(grid: InProcessGrid) -> None:
    replies = ask(grid)
    assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
    assert [reply.content["metrics"]["partition"] for reply in replies] == [0, 1, 2]
    assert {reply.content["metrics"]["setting"] for reply in replies} == {3}
    assert {reply.metadata.group_id for reply in replies} == {"1"}
    assert len({reply.metadata.message_id for reply in replies} - {""}) == 3


def test_a_node_keeps_its_context_between_messages(grid: InProcessGrid) -> None:
    ask(grid)
    assert [reply.content["metrics"]["calls"] for reply in ask(grid)] == [2, 2, 2]


def test_a_client_writes_over_its_own_copy_only(grid: InProcessGrid) -> None:
    shared = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(2))})})
    ask(grid, shared)
    np.testing.assert_array_equal(shared["arrays"]["a"].numpy(), np.zeros(2))


def test_a_client_that_raises_answers_flowers_error_and_forgets() -> None:
    with grid_of(2, node_configs=[{}, {"fail": True}]) as grid:
        fine, failed = ask(grid)
        assert not fine.has_error()
        assert failed.error.code == 2  # CLIENT_APP_RAISED_EXCEPTION
        assert failed.error.reason == "<class 'RuntimeError'>:<'planted'>"
        assert failed.metadata.src_node_id == 1001
        assert not grid._contexts[1001].state


def test_what_a_client_raised_is_in_the_nodes_own_log(caplog: pytest.LogCaptureFixture) -> None:
    with grid_of(1, node_configs=[{"fail": True}]) as grid:
        ask(grid)
    (logged,) = [one for one in caplog.records if one.name == NODE_LOGGER]
    assert logged.levelname == "ERROR"
    assert logged.getMessage() == "ClientApp of node 1000 raised an exception"
    assert str(logged.exc_info[1]) == "planted"


def test_a_silent_node_is_missing_from_the_replies() -> None:
    with grid_of(3, fault=lambda m: Fault.SILENT if m.metadata.dst_node_id == 1001 else None) as g:
        assert [reply.metadata.src_node_id for reply in ask(g)] == [1000, 1002]


def test_an_unreachable_node_answers_flowers_error() -> None:
    with grid_of(1, fault=lambda message: Fault.UNREACHABLE) as grid:
        (reply,) = ask(grid)
        assert reply.error.code == 5  # NODE_UNAVAILABLE
        assert reply.metadata.src_node_id == 1000


def test_a_reply_is_pulled_once(grid: InProcessGrid) -> None:
    content = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(2))})})
    ids = list(grid.push_messages([Message(content, 1000, "train")]))
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["unknown"])) == []


def test_the_process_gets_its_identity_back() -> None:
    def identity() -> tuple[object, ...]:
        return (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)

    before = identity()
    with grid_of(2) as grid:
        server = identity()
        ask(grid)
        assert identity() == server
    assert identity() == before


def test_flowers_older_calls_work(grid: InProcessGrid) -> None:
    assert grid.create_message(RecordDict(), "query", 1000, "g").metadata.group_id == "g"
    run = grid.run
    grid.set_run(run)
    assert grid.run is run


def test_bad_arguments_are_refused(grid: InProcessGrid) -> None:
    with pytest.raises(ValueError, match="num_supernodes=0 must be an integer >= 1"):
        InProcessGrid(app, num_supernodes=0)
    with pytest.raises(ValueError, match="node_configs holds 1, not 2"):
        InProcessGrid(app, num_supernodes=2, node_configs=[{}])
    with pytest.raises(ValueError, match="dst_node_id=5 must be one of"):
        grid.push_messages([Message(RecordDict(), 5, "train")])
