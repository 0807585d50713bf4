import logging
import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from dpfl_flower.client import NodeErrorCode
from dpfl_flower.layout import ArrayLayout
from dpfl_strategies.replies import accepted, parse_train
from tests.support.recording_grid import RecordingGrid, record, reply

MODEL = {"a0": np.zeros(3, np.float32), "a1": np.array(1, np.int64)}
LAYOUT = ArrayLayout.of(MODEL)
GOOD = record(np.ones(3, np.float32), np.array(1, np.int64))


def answers(*contents, group="1"):
    RecordingGrid(lambda _: None, 1)  # messages can be made once a run is known
    return [
        Message(content, reply_to=Message(RecordDict(), 100 + i, "train", group_id=group))
        for i, content in enumerate(contents)
    ]


def test_a_reply_counts_once_from_a_node_that_was_asked_in_this_round():
    first, second, third = answers(reply(GOOD), reply(GOOD), reply(GOOD))
    (late,) = answers(reply(GOOD), group="0")
    found = list(accepted([late, first, first, second, third], asked={100, 101}, group="1"))
    assert found == [first, second]


def test_an_error_counts_as_the_nodes_answer_and_its_text_is_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    error, good = answers(Error(2, "patient 4711"), reply(GOOD))
    good_from_same = Message(
        reply(GOOD), reply_to=Message(RecordDict(), 100, "train", group_id="1")
    )
    assert list(accepted([error, good_from_same, good], asked={100, 101}, group="1")) == [good]
    assert "4711" not in caplog.text
    assert "error code 2" in caplog.text


def test_the_sentence_of_a_code_of_ours_is_logged_and_an_unknown_code_is_a_number(caplog):
    caplog.set_level(logging.DEBUG)
    ours, unknown = answers(Error(101, "patient 4711"), Error(9999, "patient 4711"))
    assert list(accepted([ours, unknown], asked={100, 101}, group="1")) == []
    first, second = caplog.messages
    assert first.endswith(f"node 100 answered error code 101, {NodeErrorCode(101).reason}")
    assert second.endswith("node 101 answered error code 9999")
    assert "4711" not in caplog.text


def test_a_reply_as_flowers_own_clients_send_it_is_read():
    (message,) = answers(reply(GOOD, num_examples=12, loss=0.5))
    parsed = parse_train(message, LAYOUT)
    assert parsed.node_id == 100
    assert parsed.num_examples == 12
    np.testing.assert_array_equal(parsed.arrays["a0"], np.ones(3))


def test_the_arrays_may_have_another_record_name_if_there_is_only_one():
    (named,) = answers(RecordDict({"weights": GOOD}))
    assert math.isnan(parse_train(named, LAYOUT).num_examples)
    (two,) = answers(RecordDict({"weights": GOOD, "more": GOOD}))
    assert parse_train(two, LAYOUT) is None


@pytest.mark.parametrize(
    "arrays",
    [
        ArrayRecord(),
        record(np.ones(3, np.float32)),
        record(np.ones(4, np.float32), np.array(1)),
        record(np.ones((3, 1), np.float32), np.array(1)),
        record(np.ones(3, np.float32), np.array(1), np.zeros(1)),
        record(np.ones(3, np.int64), np.array(1)),
        record(np.ones(3, np.float32), np.array(1), names=["a0", "sentinel-name"]),
    ],
)
def test_a_malformed_reply_is_a_dropout_and_nothing_it_says_is_logged(arrays, caplog):
    (message,) = answers(reply(arrays))
    assert parse_train(message, LAYOUT) is None
    assert "malformed" in caplog.text
    assert "sentinel" not in caplog.text


def test_bytes_that_are_no_array_are_a_dropout():
    (message,) = answers(reply(record(np.ones(3, np.float32), np.array(1))))
    message.content["arrays"]["a0"].data = b"\x93NUMPY garbage"
    assert parse_train(message, LAYOUT) is None


@pytest.mark.parametrize("value", [[1.0, 2.0]])
def test_a_count_that_is_no_number_is_nan(value):
    (message,) = answers(
        RecordDict({"arrays": GOOD, "metrics": MetricRecord({"num-examples": value})})
    )
    assert math.isnan(parse_train(message, LAYOUT).num_examples)
