import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfl_flower.metric_ranges import MetricRanges

RANGES = MetricRanges.of({"accuracy": (0.0, 1.0), "loss": (-2, 5)})
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(low=finite, high=finite, value=finite)
def test_every_value_has_a_place_within_one_and_comes_back_clipped(low, high, value):
    low, high = sorted((low, high))
    if not 0 < high - low < math.inf:
        return
    ranges = MetricRanges.of({"m": (low, high)})
    (place,) = ranges.places({"m": value})
    assert -1 <= place <= 1
    clipped = min(max(value, low), high)
    assert ranges.values([place])["m"] == pytest.approx(clipped, abs=1e-9 * (high - low))


def test_the_ends_of_a_range_are_exactly_one_from_its_middle():
    assert RANGES.places({"accuracy": 0.0, "loss": 5}) == (-1.0, 1.0)
    assert RANGES.places({"accuracy": 0.5, "loss": 1.5}) == (0.0, 0.0)
    assert RANGES.places({"accuracy": -7, "loss": 1e308}) == (-1.0, 1.0)


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, -math.inf, "1", True, [0.5], 10**400, object()]
)
def test_what_is_no_finite_number_has_no_place_and_the_others_keep_theirs(value):
    first, second = RANGES.places({"accuracy": value, "loss": 5.0})
    assert math.isnan(first)
    assert second == 1.0
    assert math.isnan(RANGES.places({})[1])


def test_noise_that_leaves_the_range_is_clipped_and_measured_in_the_metrics_units():
    assert RANGES.values([7.0, -7.0]) == {"accuracy": 1.0, "loss": -2.0}
    assert RANGES.spread(0.1) == pytest.approx({"accuracy": 0.05, "loss": 0.35})
    assert RANGES.missing([math.nan, 0.0]) == ("accuracy",)


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ({"m": (1.0, 1.0)}, r"range=\(1.0, 1.0\) of the metric 'm'"),
        ({"m": (2.0, 1.0)}, "low < high"),
        ({"m": (0.0, math.inf)}, "both finite"),
        ({"m": (math.nan, 1.0)}, "both finite"),
        ({"m": (-1.7e308, 1.7e308)}, "both finite"),
        ({"m": (0, 10**400)}, "both finite"),
        ({"m": ("0", "1")}, "both finite"),
        ({"m": (False, True)}, "both finite"),
        ({"m": (0.0, 1.0, 2.0)}, r"must be \(low, high\)"),
        ({"m": 1.0}, r"must be \(low, high\)"),
        ({"": (0.0, 1.0)}, "metric=''"),
        ({3: (0.0, 1.0)}, "metric=3"),
        (["m"], "bounds="),
    ],
)
def test_a_range_that_is_none_is_refused_by_its_name(bounds, named):
    with pytest.raises(ValueError, match=named):
        MetricRanges.of(bounds)


def test_names_and_ranges_must_match():
    with pytest.raises(ValueError, match="one length"):
        MetricRanges(("a",), (0.0,), ())
    with pytest.raises(ValueError, match="twice"):
        MetricRanges(("a", "a"), (0.0, 0.0), (1.0, 1.0))
    assert len(MetricRanges()) == 0
    assert MetricRanges().places({"a": 1.0}) == ()


def test_how_much_a_node_weighs_is_no_metric():
    with pytest.raises(ValueError, match="num-examples"):
        MetricRanges.of({"num-examples": (0, 1000)})
