"""User code steps in at the named points only; the private pipeline cannot be lost by accident."""

import logging

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from dpfl_flower.accounting import CustomSampling, EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_strategies import DPFedAvg, PrivateStrategy
from tests.support.contracts import sentinel
from tests.support.contracts.sentinel import COUNT
from tests.support.contracts.strategy import flat, quiet
from tests.support.recording_grid import adding, record, reply
from tests.support.scripted_grid import ScriptedGrid

PIPELINE = (
    "start",
    "configure_train",
    "aggregate_train",
    "configure_evaluate",
    "aggregate_evaluate",
)
NODES = 4


def settings(**changes):
    return {
        "noise_multiplier": 1.0,
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(1.0),
        "wait_seconds": 0.0,
    } | changes


@pytest.mark.parametrize("name", PIPELINE)
@pytest.mark.parametrize("base", [PrivateStrategy, DPFedAvg])
def test_a_subclass_that_replaces_a_step_of_the_pipeline_is_refused(base, name):
    with pytest.raises(TypeError, match=name):
        type("Mine", (base,), {name: lambda self, *_: None})


@pytest.mark.parametrize("name", PIPELINE)
def test_a_mixin_that_replaces_a_step_of_the_pipeline_is_refused(name):
    mixin = type("Mixin", (), {name: lambda self, *_: None})
    with pytest.raises(TypeError, match=name):
        type("Mine", (mixin, DPFedAvg), {})


def test_flowers_own_strategy_beside_it_does_not_take_over_the_pipeline():
    with pytest.raises(TypeError):
        type("Mine", (FedAvg, DPFedAvg), {})


class Reckless(DPFedAvg):
    """A user's weight that trusts what nodes say."""

    def weigh(self, num_examples):
        return num_examples / 100


def test_a_weight_out_of_range_costs_its_node_the_round_and_nobody_else(caplog):
    caplog.set_level(logging.DEBUG)

    def client(message):
        answer = adding(0.1)(message)
        hostile = message.metadata.dst_node_id == 100
        return reply(answer["arrays"], num_examples=COUNT if hostile else 50)

    grid = ScriptedGrid(client, NODES)
    result = Reckless(**settings()).start(grid, record(np.zeros(3)), num_rounds=2)
    assert result.rounds == 2
    sentinel.require_absent_from_logs(caplog)


class EverybodyTwice(CustomSampling):
    """A careless rule of one's own: each node twice, and one that nobody knows."""

    @property
    def population(self):
        return NODES

    @property
    def expected_cohort(self):
        return NODES

    def draw(self, registry, rng):
        return [*registry, *registry]


def test_a_rule_that_draws_a_node_twice_counts_it_once():
    def moved(update):
        def client(message):
            return adding(update if message.metadata.dst_node_id == 100 else 0.0)(message)

        strategy = DPFedAvg(**settings(noise_multiplier=0.0, sampling=EverybodyTwice()))
        with quiet():
            result = strategy.start(ScriptedGrid(client, NODES), record(np.zeros(3)), 1)
        return flat(result.arrays)

    try:
        difference = moved(10.0) - moved(0.0)
    except ValueError:
        return  # refused: as good
    assert np.linalg.norm(difference) <= 1.001 / NODES
