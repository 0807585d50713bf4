"""What a node whose answer is private already puts under masks, and what it refuses to."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from dpfl_flower import records
from dpfl_flower.accounting import Gaussian, events_to_json
from dpfl_flower.client import LocalNoise
from dpfl_flower.client.contribution import contribution_for
from dpfl_flower.client.contribution_base import SumBound
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.public_claim import public_claim
from dpfl_flower.client.weighted_update import AverageRequest
from dpfl_flower.secagg import fewest_bits

DIMENSION = 5
REFERENCE = np.array([1.0, -2.0, 0.5, 0.0, 3.0], np.float32)
CLAIM = {
    "dataset": "heart",
    "epsilon": 0.5,
    "delta": 1e-5,
    "unit": "example",
    "relation": "add-or-remove-one",
    "durable": True,
    "events": events_to_json([Gaussian(5.0)]),
}


def task(**changes):
    request = AverageRequest(
        **{"dimension": DIMENSION, "max_update_norm": 4.0, "parties": 20} | changes
    )
    return {
        records.ARRAYS: ArrayRecord({"w": Array(REFERENCE)}),
        records.CONFIG: ConfigRecord({"server-round": 1}),
        records.AVERAGE: request.to_config(),
    }


def contribution(content, *, width=DIMENSION + 1, bits=32, lanes=1):
    return contribution_for(RecordDict(content), {}, width=width, bits=bits, lanes=lanes)


def answer(update=0.25, *, examples=3, claim=CLAIM):
    content = {
        "arrays": ArrayRecord({"w": Array(REFERENCE + np.float32(update))}),
        "metrics": MetricRecord({"num-examples": examples}),
    }
    if claim is not None:
        content["privacy"] = ConfigRecord(claim)
    return RecordDict(content)


def refused(code, call, *arguments, **named):
    with pytest.raises(NodeError) as failed:
        call(*arguments, **named)
    assert failed.value.code is code


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (0.1, "shortened"),
        (4.0, ""),
        (1e5, ""),
        (1e6, "small beside"),
        (0.249 * 2**25, "small beside"),  # 0.25 is just above half a unit
        (0.251 * 2**25, "rounded to nothing"),
        (1e8, "rounded to nothing"),
    ],
)
def test_a_nodes_log_says_where_the_bound_is_no_good_for_its_update(most, said, caplog):
    contribution(task(max_update_norm=most)).vector(answer())
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)
    caplog.clear()
    contribution(task(max_update_norm=most)).vector(answer(0.0))
    assert not caplog.records


def test_a_vector_is_the_update_in_fixed_point_and_the_weight_last():
    made = contribution(task())
    assert set(made.task) == {records.ARRAYS, records.CONFIG}
    vector = made.vector(answer())
    assert vector.dtype == np.int32
    np.testing.assert_array_equal(vector[:-1], round(0.25 / 4.0 * 2**24))
    assert vector[-1] == 1
    weighed = contribution(task(max_num_examples=6)).vector(answer())
    units = AverageRequest(
        dimension=DIMENSION, max_update_norm=4.0, parties=20, max_num_examples=6
    ).weight_units
    assert weighed[-1] == units / 2 and 2**23 <= units < 2**24
    np.testing.assert_array_equal(weighed[:-1], round(0.25 / 4.0 * 2**23))


def test_a_bound_that_no_grid_has_is_refused_whatever_the_app_would_answer():
    refused(
        NodeErrorCode.MALFORMED_REQUEST,
        contribution,
        task(max_update_norm=1e-305, max_num_examples=10),
    )


@pytest.mark.parametrize("most", [0, 1, 7, 1000, 2**24 + 1, 2**26])
def test_the_bound_covers_every_entry_that_a_node_can_answer(most):
    request = AverageRequest(
        dimension=DIMENSION, max_update_norm=4.0, parties=20, max_num_examples=most
    )
    made = contribution(task(max_num_examples=most), bits=40)
    for update in (1e9, np.array([1e9, 0, 0, 0, 0]), -1e9, 0.0):
        vector = made.vector(answer(update, examples=2**40))
        assert np.abs(vector).max() <= request.bound.largest
        assert vector[-1] == request.weight_units
    assert np.linalg.norm(made.vector(answer(1e9, examples=2**40))[:-1].astype(float)) <= (
        request.grid.sensitivity_units
    )
    if 0 < most < 2**24:
        assert request.weight_units % most == 0, "whole numbers of examples are exact"


NEEDED = fewest_bits(2**24, 20)


@pytest.mark.parametrize(
    "changes", [{"bits": NEEDED - 1}, {"bits": 22, "lanes": 8}, {"width": DIMENSION}, {"width": 7}]
)
def test_a_sum_that_could_wrap_or_has_another_width_is_refused(changes):
    contribution(task(), bits=NEEDED)
    refused(NodeErrorCode.MALFORMED_REQUEST, contribution, task(), **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimension", DIMENSION + 1),
        ("dimension", 0),
        ("dimension", 5.0),
        ("max-update-norm", 0.0),
        ("max-update-norm", float("nan")),
        ("max-update-norm", "4"),
        ("max-num-examples", -1),
        ("max-num-examples", 2**26 + 1),
        ("parties", 0),
        ("parties", 2**62),
        ("parties", [1]),
        ("patients", 1),
    ],
)
def test_each_field_of_a_request_is_checked(field, value):
    content = task()
    content[records.AVERAGE][field] = value
    width = DIMENSION + 2 if value == DIMENSION + 1 else DIMENSION + 1
    refused(NodeErrorCode.MALFORMED_REQUEST, contribution, content, width=width)
    del content[records.AVERAGE][field]
    if field != "patients":
        refused(NodeErrorCode.MALFORMED_REQUEST, contribution, content)


def test_a_request_without_a_model_is_refused():
    content = task()
    del content[records.ARRAYS]
    refused(NodeErrorCode.MALFORMED_REQUEST, contribution, content)


def test_an_answer_of_another_shape_is_refused():
    made = contribution(task())
    other = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(6))})})
    refused(NodeErrorCode.MALFORMED_REPLY, made.vector, other)
    refused(NodeErrorCode.MALFORMED_REPLY, made.vector, RecordDict())


@pytest.mark.parametrize("weight", [0, -1, 21])
def test_a_weight_that_vectors_cannot_add_up_to_gives_no_mean(weight):
    request = AverageRequest(dimension=2, max_update_norm=4.0, parties=20)
    total = np.array([2**22, 0, weight], np.int64)
    assert request.mean(total, survivors=20) is None
    total[-1] = 20
    np.testing.assert_allclose(request.mean(total, survivors=20), [0.05, 0.0], rtol=1e-6)


# --- claims ------------------------------------------------------------------------------------


def test_the_claim_is_what_a_server_reads_and_no_more():
    more = CLAIM | {"statement": "epsilon 0.5 for 4711 patients", "patients": 4711}
    assert dict(public_claim(answer(claim=more))) == CLAIM
    weaker = CLAIM | {"cryptographic": False}
    assert dict(public_claim(answer(claim=weaker))) == weaker


@pytest.mark.parametrize("field", list(CLAIM))
@pytest.mark.parametrize("value", [None, b"\xff", [1], "nonsense", -1.5, 4711])
def test_a_claim_that_cannot_be_read_is_none(field, value):
    if (field, value) in [("dataset", "nonsense"), ("epsilon", 4711)]:
        public_claim(answer(claim=CLAIM | {field: value}))
        return
    claim = {k: v for k, v in CLAIM.items() if k != field}
    if value is not None:
        claim[field] = value
    refused(NodeErrorCode.MALFORMED_REPLY, public_claim, answer(claim=claim))
    refused(NodeErrorCode.MALFORMED_REPLY, public_claim, answer(claim=None))


# --- a sum with all of a node's noise in it ------------------------------------------------------

NOISE = LocalNoise(clip_norm=1.0, rounds=2, delta=1e-5, noise_multiplier=2.0, max_inflation=1.1)
LOCAL = LocalRequest(noise=NOISE, dimension=DIMENSION, server_round=1)
LARGEST = LOCAL.grid.sensitivity_units + LOCAL.largest_noise


def noisy(largest=LARGEST, **changes):
    return {
        records.ARRAYS: ArrayRecord({"w": Array(REFERENCE)}),
        records.LOCAL: LOCAL.to_config(),
        records.UPDATE: SumBound(largest=largest, parties=20).to_config(),
    } | changes


def summed(total, claim=CLAIM):
    content = {"integer-sum": ArrayRecord({"sum": Array(total)})}
    if claim is not None:
        content["privacy"] = ConfigRecord(claim)
    return RecordDict(content)


def test_a_noisy_sum_needs_a_claim_and_the_mod_gets_its_request():
    made = contribution(noisy(), width=DIMENSION)
    assert set(made.task) == {records.ARRAYS, records.LOCAL}
    total = np.arange(DIMENSION, dtype=np.int64) - LARGEST
    np.testing.assert_array_equal(made.vector(summed(total)), total)
    assert dict(made.claim(summed(total))) == CLAIM
    refused(NodeErrorCode.MALFORMED_REPLY, made.claim, summed(total, claim=None))
    refused(NodeErrorCode.MALFORMED_REPLY, made.vector, summed(total - 1))
    refused(NodeErrorCode.MALFORMED_REPLY, made.vector, summed(total.astype(float)))


def test_a_sum_without_noise_of_its_own_takes_no_claim_along():
    cohort = noisy()
    del cohort[records.LOCAL]
    made = contribution(cohort | {records.COHORT: ConfigRecord()}, width=DIMENSION)
    assert made.claim(summed(np.zeros(DIMENSION, np.int64))) is None


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        (noisy(), {"bits": fewest_bits(LARGEST, 20) - 1}),
        (noisy(largest=LARGEST - 1), {}),  # the noise alone might not fit
        (noisy(), {"width": DIMENSION + 1}),
        (noisy(**{records.UPDATE: ConfigRecord()}), {}),
        (noisy(**{records.LOCAL: ConfigRecord()}), {}),
        ({k: r for k, r in noisy().items() if k != records.UPDATE}, {}),
    ],
)
def test_a_noisy_sum_that_might_not_fit_is_refused(content, changes):
    contribution(noisy(), width=DIMENSION, bits=fewest_bits(LARGEST, 20))
    refused(
        NodeErrorCode.MALFORMED_REQUEST, contribution, content, **({"width": DIMENSION} | changes)
    )
