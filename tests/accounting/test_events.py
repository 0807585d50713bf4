import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfl_flower.accounting import (
    CappedPoissonSampled,
    Composed,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    event_from_json,
    events_from_json,
    events_to_json,
)
from dpfl_flower.accounting.events import count_events

noise = st.floats(0, 1e6)
rates = st.floats(0, 1, exclude_min=True)
below_one = st.floats(0, 1, exclude_min=True, exclude_max=True)
gaussians = st.builds(Gaussian, noise)
counts, large = st.integers(1, 99), st.integers(99, 10**12)
elementary = (
    gaussians
    | st.builds(Laplace, noise)
    | st.builds(PoissonSampled, rates, gaussians)
    | st.builds(CappedPoissonSampled, st.integers(1, 99), below_one, st.integers(1, 99), noise)
    | st.builds(FixedSizeSampled, st.integers(50, 99), st.integers(1, 50), gaussians)
    | st.builds(DistributedDiscreteGaussian, counts, counts, counts, large, counts)
    | st.builds(DistributedSkellam, counts, counts, counts, large, counts)
)
events = st.recursive(elementary, lambda inner: st.builds(Composed, inner, st.integers(1, 9)))


@given(events)
def test_an_event_survives_json_to_the_last_bit(event):
    assert event_from_json(json.loads(json.dumps(event.to_json()))) == event


@given(st.lists(events, max_size=4))
def test_a_list_of_events_survives_one_line_of_json(several):
    text = events_to_json(several)
    assert "\n" not in text
    assert events_from_json(text) == several


@given(st.lists(events, max_size=4))
def test_counting_multiplies_nested_compositions_out(several):
    def unfold(event):
        if isinstance(event, Composed):
            return unfold(event.event) * event.count
        return [event]

    flat = [part for event in several for part in unfold(event)]
    counts = count_events(several)
    assert counts == {event: flat.count(event) for event in set(flat)}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {
            "kind": "discrete-gaussian",
            "noise_multiplier": 1.0,
        },  # never priced as the continuous one
        {"kind": "discrete-laplace", "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "more": 1},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "composed", "count": 0, "event": {"kind": "gaussian", "noise_multiplier": 1.0}},
        {"kind": "composed", "count": 2, "event": "gaussian"},
    ],
)
def test_json_that_is_no_event_is_refused(data):
    with pytest.raises(ValueError):
        event_from_json(data)


@pytest.mark.parametrize("text", ["{}", "[1]", '["gaussian"]', "not json"])
def test_json_that_is_no_list_of_events_is_refused(text):
    with pytest.raises(ValueError):
        events_from_json(text)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Gaussian(-1.0), "noise_multiplier=-1.0"),
        (lambda: Laplace(float("nan")), "noise_multiplier=nan"),
        (lambda: PoissonSampled(0.0, Gaussian(1.0)), "rate=0.0"),
        (lambda: PoissonSampled(1.5, Gaussian(1.0)), "rate=1.5"),
        (lambda: PoissonSampled(0.5, PoissonSampled(0.5, Gaussian(1.0))), "must be a Gaussian"),
        (lambda: FixedSizeSampled(10, 11, Gaussian(1.0)), "cohort=11"),
        (lambda: FixedSizeSampled(10, 5, Laplace(1.0)), "must be a Gaussian"),
        (lambda: CappedPoissonSampled(10, 0.5, 0, 1.0), "cap=0"),
        (lambda: CappedPoissonSampled(10, 1.0, 8, 1.0), "rate=1.0 must be < 1 with a cap of 8"),
        (lambda: CappedPoissonSampled(10, 0.5, 8, -1.0), "noise_multiplier=-1.0"),
        (lambda: Composed(Gaussian(1.0), 0), "count=0"),
        (lambda: Composed("gaussian", 2), "event='gaussian'"),
        (lambda: count_events(["gaussian"]), "event='gaussian'"),
    ],
)
def test_a_bad_event_is_refused_by_name_and_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()
