"""The configuration is public, complete and within bounds."""

import dataclasses

import pytest

from dpfl_flower.accounting import Composed, Gaussian, PoissonSampled, epsilon
from dpfl_flower.client import ClipStyle, DPSGDConfig

GOOD = {
    "sampling_rate": 0.1,
    "steps_per_round": 5,
    "planned_rounds": 10,
    "clip_norm": 1.0,
    "expected_batch_size": 20.0,
    "delta": 1e-4,
    "noise_multiplier": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate=0.0"),
        ({"sampling_rate": 1.1}, "sampling_rate=1.1"),
        ({"steps_per_round": 0}, "steps_per_round=0"),
        ({"steps_per_round": 2.5}, "steps_per_round=2.5"),
        ({"planned_rounds": 0}, "planned_rounds=0"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"clip_norm": float("inf")}, "clip_norm=inf"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 0.005}, r"delta=0.005 must be < 0.005"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": None}, "one of them"),
        ({"target_epsilon": 1.0}, "one of them"),
        ({"noise_multiplier": None, "target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"weight": 0}, "weight=0"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size=0"),
        ({"relation": "neighbours"}, "neighbours"),
        ({"clip_style": "square"}, "square"),
    ],
)
def test_what_is_out_of_bounds_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        DPSGDConfig(**{**GOOD, **changes})


def test_strings_are_parsed_once():
    config = DPSGDConfig(**GOOD, relation="replace-one", clip_style="per-layer")
    assert config.clip_style is ClipStyle.PER_LAYER
    assert config.relation.name == "REPLACE_ONE"


def test_a_step_is_sampled_only_where_it_samples():
    config = DPSGDConfig(**GOOD)
    assert config.event(2.0) == PoissonSampled(0.1, Gaussian(2.0))
    everyone = dataclasses.replace(config, sampling_rate=1.0)
    assert everyone.event(2.0) == Gaussian(2.0)


def test_a_given_noise_multiplier_is_used_as_it_is():
    config = DPSGDConfig(**GOOD)
    assert config.resolve_noise_multiplier() == 1.0
    assert config.budget is None


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_target_epsilon_holds_over_all_planned_steps(rate, relation):
    config = DPSGDConfig(
        **{**GOOD, "sampling_rate": rate, "noise_multiplier": None},
        target_epsilon=2.0,
        relation=relation,
    )
    z = config.resolve_noise_multiplier()

    def cost(noise):
        planned = [Composed(config.event(noise), config.planned_steps)]
        return epsilon(planned, delta=config.delta, relation=relation)

    assert config.planned_steps == 50
    assert cost(z) <= 2.0 < cost(z * 0.99)
    assert config.budget.epsilon == 2.0
