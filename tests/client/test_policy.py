"""A node can refuse what an app asks for."""

import math

import pytest

from dpfl_flower.client import NodeError, NodeErrorCode, NodePolicy


@pytest.mark.parametrize(
    ("config", "noise_multiplier", "epsilon", "allowed"),
    [
        ({}, 0.0, math.inf, True),
        ({"min-noise-multiplier": 1.0}, 1.0, math.inf, True),
        ({"min-noise-multiplier": 1.0}, 0.999, 0.1, False),
        ({"min-noise-multiplier": 1}, math.nan, 0.1, False),
        ({"max-epsilon": 2.0}, 0.0, 2.0, True),
        ({"max-epsilon": 2.0}, 9.0, 2.001, False),
        ({"max-epsilon": 2}, 9.0, math.inf, False),
        ({"max-epsilon": 2}, 9.0, math.nan, False),
        ({"max-epsilon": 2.0, "min-noise-multiplier": 1.0, "partition-id": 3}, 1.0, 1.0, True),
    ],
)
def test_less_noise_or_more_epsilon_is_refused(config, noise_multiplier, epsilon, allowed):
    policy = NodePolicy.from_node_config(config)
    if allowed:
        policy.check(noise_multiplier=noise_multiplier, epsilon=epsilon)
    else:
        with pytest.raises(NodeError) as refused:
            policy.check(noise_multiplier=noise_multiplier, epsilon=epsilon)
        assert refused.value.code is NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize(
    "config",
    [
        {"min-noise-multiplier": "high"},
        {"min-noise-multiplier": True},
        {"min-noise-multiplier": -0.1},
        {"max-epsilon": "1"},
        {"max-epsilon": 0.0},
        {"max-epsilon": math.inf},
    ],
)
def test_a_bound_that_is_none_is_an_error(config):
    with pytest.raises(ValueError, match=r"noise.multiplier|max.epsilon"):
        NodePolicy.from_node_config(config)
