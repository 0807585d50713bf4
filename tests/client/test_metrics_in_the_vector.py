"""A node under secure aggregation: metrics leave it inside the masked vector, or not at all."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from dpfl_flower import records
from dpfl_flower.client.contribution import UpdateRequest, contribution_for
from dpfl_flower.client.contribution_base import SumBound
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.grid_fields import METRIC_FIELDS
from dpfl_flower.client.users import CohortRequest
from dpfl_flower.metric_ranges import MetricRanges
from dpfl_flower.quantize import IntegerGrid
from dpfl_flower.secagg import fewest_bits

RANGES = MetricRanges.of({"accuracy": (0.0, 1.0), "loss": (0.0, 4.0)})
GRID = IntegerGrid.for_noise_multiplier(1.0, 4, indicator_noise=2.0, num_metrics=2)
LARGEST = 1 << 15
BITS = fewest_bits(LARGEST, 4)


def request(**changes):
    settings = {"grid": GRID, "metrics": RANGES, "clip_norm": 1.0} | changes
    return UpdateRequest(largest=LARGEST, parties=4, **settings)


def content(record):
    arrays = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    return RecordDict({records.ARRAYS: arrays, records.UPDATE: record})


def vector(metrics, *, update=0.25, **changes):
    asked = request(**changes)
    made = contribution_for(content(asked.to_config()), {}, width=asked.grid.width, bits=BITS)
    arrays = ArrayRecord({"w": Array(np.full(4, update, np.float32))})
    return made.vector(RecordDict({records.ARRAYS: arrays, "metrics": metrics})).tolist()


def test_a_request_travels_whole():
    for record in (request().to_config(), ConfigRecord.inflate(request().to_config().deflate())):
        assert UpdateRequest.from_config(record) == request()
    plain = request(grid=IntegerGrid.for_noise_multiplier(1.0, 4), metrics=MetricRanges())
    assert not plain.to_config().keys() & METRIC_FIELDS
    assert UpdateRequest.from_config(plain.to_config()) == plain


def test_each_metric_is_its_place_in_its_range_behind_the_indicator():
    k = GRID.metric_units
    found = vector(MetricRecord({"accuracy": 0.75, "loss": 9.0, "num-examples": 3}))
    assert found[4:] == [GRID.indicator_units, round(k / 2), k]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, [0, 0]),
        ({"accuracy": math.nan, "loss": math.inf}, [0, 0]),
        ({"accuracy": [0.1, 0.2], "loss": 0.0}, [0, -1]),
        ({"accuracy": -3, "loss": 2**62}, [-1, 1]),
    ],
)
def test_what_is_missing_or_no_number_adds_nothing(metrics, expected):
    k = GRID.metric_units
    assert vector(MetricRecord(metrics))[5:] == [k * sign for sign in expected]


def test_the_nodes_log_names_a_metric_that_its_answer_has_not_and_those_that_it_has(caplog):
    vector(MetricRecord({"acc": 0.5, "loss": 1.0}))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dpfl_flower.node", "WARNING")
    assert "['accuracy']" in record.getMessage()
    assert "middle of its range" in record.getMessage()
    assert record.getMessage().endswith("['acc', 'loss']")
    caplog.clear()
    vector(MetricRecord({"accuracy": 0.5, "loss": 1.0, "other": 2.0}))
    assert not caplog.records


def test_of_a_node_whose_update_is_not_finite_nothing_counts():
    metrics = MetricRecord({"accuracy": 1.0, "loss": 4.0})
    assert not any(vector(metrics, update=math.nan))
    # Weights are for updates: each node's metrics count once.
    unweighted = vector(metrics, w_max=100.0)
    assert unweighted[:4] == [0, 0, 0, 0]  # it reports no examples
    assert unweighted[5:] == [GRID.metric_units] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"metric-names": ["accuracy"]},
        {"metric-names": ["accuracy", "accuracy"]},
        {"metric-names": "accuracy"},
        {"metric-names": [1, 2]},
        {"metric-lows": [0.0, math.nan]},
        {"metric-lows": [0.0, 4.0]},
        {"metric-highs": ["1", "4"]},
        {"metric-units": 0},
        {"metric-units": 1 << 16},  # more than largest says
        {"metric-units": 1.0},
        {"num-metrics": 3},
        {"num-metrics": 0},
        {"metric-weights": [1.0, 1.0]},
    ],
)
def test_a_request_that_does_not_fit_is_refused(change):
    record = ConfigRecord(dict(request().to_config()) | change)
    with pytest.raises(NodeError) as refused:
        contribution_for(content(record), {}, width=GRID.width, bits=BITS)
    assert refused.value.code is NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize("missing", sorted(METRIC_FIELDS))
def test_a_request_without_one_of_its_fields_is_refused(missing):
    record = request().to_config()
    del record[missing]
    with pytest.raises(NodeError) as refused:
        contribution_for(content(record), {}, width=GRID.width, bits=BITS)
    assert refused.value.code is NodeErrorCode.MALFORMED_REQUEST


def test_a_node_insists_on_noise_for_all_of_the_vector():
    least = GRID.noise_multiplier
    asked = content(request().to_config())
    contribution_for(asked, {"min-noise-multiplier": least}, width=GRID.width, bits=BITS)
    # The same noise for longer metrics is a smaller multiplier.
    record = ConfigRecord(dict(request().to_config()) | {"metric-units": 2 * GRID.metric_units})
    with pytest.raises(NodeError) as refused:
        contribution_for(
            content(record), {"min-noise-multiplier": least}, width=GRID.width, bits=BITS
        )
    assert refused.value.code is NodeErrorCode.POLICY_REFUSED


def test_users_inside_a_node_are_not_asked_for_metrics():
    settings = {"clip_norm": 1.0, "server_round": 1, "sampling_rate": 1.0}
    with pytest.raises(ValueError, match="num_metrics=2 must be 0"):
        CohortRequest(grid=GRID, **settings)
    plain = CohortRequest(grid=IntegerGrid.for_noise_multiplier(1.0, 4), **settings)
    for field, value in {"num-metrics": 1, "metric-units": 5, "metric-names": ["a"]}.items():
        with pytest.raises(ValueError, match="unknown fields"):
            CohortRequest.from_config(ConfigRecord(dict(plain.to_config()) | {field: value}))


def test_an_answer_with_a_claim_of_its_own_is_summed_as_such_or_not_at_all():
    """Its weights are noised, its metrics are not: a server that lies asks for the exact sum."""
    claimed = RecordDict(
        {
            records.ARRAYS: ArrayRecord({"w": Array(np.full(4, 0.25, np.float32))}),
            records.METRICS: MetricRecord({"loss": 3.0}),
            records.INTEGER_SUM: ArrayRecord({records.SUM: Array(np.zeros(4, np.int64))}),
            records.PRIVACY: ConfigRecord({"epsilon": 1.0}),
        }
    )
    asked = content(request().to_config())
    cohort = content(SumBound(largest=LARGEST, parties=4).to_config())
    cohort[records.COHORT] = ConfigRecord()
    for what in (asked, cohort):
        made = contribution_for(what, {}, width=GRID.width, bits=BITS)
        with pytest.raises(NodeError, match="privacy claim") as refused:
            made.vector(claimed)
        assert refused.value.code is NodeErrorCode.MALFORMED_REPLY
        del claimed[records.PRIVACY]
        made.vector(claimed)
        claimed[records.PRIVACY] = ConfigRecord({"epsilon": 1.0})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_request_names_as_many_metrics_as_its_grid_carries(count):
    ranges = MetricRanges.of({f"m{n}": (0.0, 1.0) for n in range(count)})
    with pytest.raises(ValueError, match="must be 2, the grid's"):
        request(metrics=ranges)
