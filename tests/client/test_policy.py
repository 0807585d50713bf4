"""A node can refuse what an app asks for."""

import math

import pytest

from dpfl_flower.accounting import Gaussian, Ledger, epsilon
from dpfl_flower.client import NodeError, NodeErrorCode, NodePolicy


@pytest.mark.parametrize(
    ("config", "noise_multiplier", "epsilon", "allowed"),
    [
        ({}, 0.0, math.inf, True),
        ({"min-noise-multiplier": 1.0}, 1.0, math.inf, True),
        ({"min-noise-multiplier": 1.0}, 0.999, 0.1, False),
        ({"min-noise-multiplier": 1}, math.nan, 0.1, False),
        ({"max-epsilon": 2.0, "max-delta": 1e-5}, 0.0, 2.0, True),
        ({"max-epsilon": 2.0, "max-delta": 1e-5}, 9.0, 2.001, False),
        ({"max-epsilon": 2, "max-delta": 1e-5}, 9.0, math.inf, False),
        ({"max-epsilon": 2, "max-delta": 1e-5}, 9.0, math.nan, False),
        ({"max-epsilon": 2.0, "max-delta": 9e-6}, 9.0, 1.0, False),
        (
            {"max-epsilon": 2.0, "max-delta": 0.1, "min-noise-multiplier": 1.0, "partition-id": 3},
            1.0,
            1.0,
            True,
        ),
    ],
)
def test_less_noise_or_more_epsilon_is_refused(config, noise_multiplier, epsilon, allowed):
    policy = NodePolicy.from_node_config(config)
    asked = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "delta": 1e-5,
        "durable": True,
    }
    if allowed:
        policy.check(**asked)
    else:
        with pytest.raises(NodeError) as refused:
            policy.check(**asked)
        assert refused.value.code is NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize(
    "ledger", [{"delta": 1e-5}, {"durable": True}, {"delta": math.nan, "durable": True}]
)
def test_no_epsilon_is_small_enough_without_a_delta_and_a_durable_ledger(ledger):
    policy = NodePolicy(max_epsilon=2.0, max_delta=1e-4)
    with pytest.raises(NodeError) as refused:
        policy.check(noise_multiplier=9.0, epsilon=0.1, **ledger)
    assert refused.value.code is NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize("config", [{"max-epsilon": 1.0}, {"max-delta": 1e-5}])
def test_an_epsilon_and_its_delta_are_given_together(config):
    with pytest.raises(ValueError, match=r"max-epsilon=.* and max-delta=.* given together"):
        NodePolicy.from_node_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"min-noise-multiplier": "high"},
        {"min-noise-multiplier": True},
        {"min-noise-multiplier": -0.1},
        {"max-epsilon": "1"},
        {"max-epsilon": 0.0},
        {"max-epsilon": math.inf},
        {"max-epsilon": 1.0, "max-delta": 0.0},
        {"max-epsilon": 1.0, "max-delta": 1.0},
        {"max-epsilon": 1.0, "max-delta": "1e-5"},
    ],
)
def test_a_bound_that_is_none_is_an_error(config):
    with pytest.raises(ValueError, match=r"noise.multiplier=|max.epsilon=|max.delta="):
        NodePolicy.from_node_config(config)


def test_a_release_is_priced_with_what_all_samplers_leave(tmp_path):
    def spent(events, variation):
        return epsilon(events, delta=1e-5, relation="add-or-remove-one", total_variation=variation)

    event, astray = Gaussian(2.0), 1e-7
    terms = {"dataset": "heart", "delta": 1e-5, "unit": "example"}
    release = {"noise_multiplier": 2.0, "chosen_by_node": True}
    with Ledger.open(tmp_path / "ledger.jsonl", **terms) as ledger:
        for before in (0, 1):  # the release's own remainder, then that of an earlier one
            events = [event] * (before + 1)
            exact, true = spent(events, 0.0), spent(events, astray)
            assert true > 1.001 * exact
            own = 0.0 if before else astray
            policy = NodePolicy(max_epsilon=(exact + true) / 2, max_delta=1e-4)
            with pytest.raises(NodeError) as refused:
                policy.check_release(ledger, event, total_variation=own, **release)
            assert refused.value.code is NodeErrorCode.POLICY_REFUSED
            enough = NodePolicy(max_epsilon=1.0001 * true, max_delta=1e-4)
            enough.check_release(ledger, event, total_variation=own, **release)
            ledger.plan(f"run {before}", event, 1, total_variation=astray)
            ledger.charge(f"run {before}")
