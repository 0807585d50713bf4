"""The plan for local noise travels whole, and nothing is believed that is not checked."""

import dataclasses

import pytest

from dpfl_flower.client.local_noise import LocalNoise
from dpfl_flower.client.local_request import LocalRequest

NODE = LocalNoise(clip_norm=0.5, rounds=9, delta=1e-5, noise_multiplier=2.0, max_inflation=1.1)
USERS = dataclasses.replace(
    NODE, unit="user", relation="add-or-remove-one", sampling_rate=0.25, law="gaussian"
)


def request(noise=NODE, **changes):
    return LocalRequest(**({"noise": noise, "dimension": 7, "server_round": 3} | changes))


@pytest.mark.parametrize("noise", [NODE, dataclasses.replace(NODE, law="laplace"), USERS])
@pytest.mark.parametrize("budget", [None, 8.0])
def test_what_arrives_is_what_was_sent(noise, budget):
    sent = request(noise, budget_epsilon=budget)
    assert LocalRequest.from_config(sent.to_config()) == sent


@pytest.mark.parametrize("key", list(request(USERS).to_config()))
def test_a_missing_field_is_refused(key):
    config = dict(request(USERS).to_config())
    del config[key]
    with pytest.raises(ValueError, match=key.replace("-", ".").split(".")[-1]):
        LocalRequest.from_config(config)


@pytest.mark.parametrize("key", list(request(USERS, budget_epsilon=1.0).to_config()))
@pytest.mark.parametrize("value", ["", -1, -1.0, 0, float("nan"), float("inf"), [1], b"x", True])
def test_a_field_of_another_type_or_out_of_range_is_refused(key, value):
    config = dict(request(USERS, budget_epsilon=1.0).to_config()) | {key: value}
    with pytest.raises(ValueError):
        LocalRequest.from_config(config)


@pytest.mark.parametrize(
    ("noise", "changes", "says"),
    [
        (NODE, {"server_round": 10}, "server_round=10 must be <= 9"),
        (NODE, {"dimension": 0}, "dimension=0"),
        (NODE, {"budget_epsilon": 0.0}, "budget_epsilon=0.0"),
        (
            dataclasses.replace(NODE, noise_multiplier=None, target_epsilon=1.0),
            {},
            "noise_multiplier=None",
        ),
    ],
)
def test_impossible_requests_are_refused(noise, changes, says):
    with pytest.raises(ValueError, match=says):
        request(noise, **changes)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown fields"):
        LocalRequest.from_config({**request().to_config(), "more": 1})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"relation": "add-or-remove-one"}, "must be 'replace-one' for unit='node'"),
        ({"relation": "zero-out"}, "must be 'replace-one' for unit='node'"),
        ({"sampling_rate": 0.5}, "must be None for unit='node'"),
        ({"unit": "user"}, "sampling_rate=None"),
        ({"unit": "user", "sampling_rate": 1.5}, "sampling_rate=1.5"),
        (
            {"unit": "user", "sampling_rate": 0.5, "law": "laplace"},
            "no valid price is known",
        ),
        ({"unit": "people"}, "unit='people'"),
    ],
)
def test_units_and_relations_without_a_price_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(NODE, **changes)
