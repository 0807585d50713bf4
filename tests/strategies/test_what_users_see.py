"""What whoever runs a strategy sees is the same, whoever adds the noise."""

import inspect
import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling, PrivacyBudget
from dpfl_flower.cli.progress import RoundProgress
from dpfl_flower.client import local_noise_mod, noise_share_mod, secure_aggregation_mod
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.final_model import MODEL, load_model
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import (
    AllClientsFailed,
    DistributedDPFedAvg,
    DPFedAvg,
    LocalDPFedAvg,
    SampleLevelFedAvg,
    Stopped,
)
from dpfl_strategies.signal_to_noise import signal_to_noise

NODES = 4
DELTA = 1e-3
CLIP = 10.0
KINDS = ["distributed", "local"]
STARTED_LIKE_FLOWERS = [DPFedAvg, SampleLevelFedAvg, DistributedDPFedAvg, LocalDPFedAvg]


def strategy(kind, **changes):
    arguments = {"clipping": FixedClipping(CLIP), "num_nodes": NODES, "wait_seconds": 0.0}
    if "budget" not in changes:
        arguments |= {"noise_multiplier": 1.0, "delta": DELTA, "unit": "node"}
    if kind == "local":
        return LocalDPFedAvg(**arguments | changes)
    if "budget" not in changes:
        arguments["relation"] = "zero-out"
    arguments |= {
        "sampling": EveryoneSampling(NODES),
        "secure_aggregation": SecAggPlus(min_cohort=3),
    }
    return DistributedDPFedAvg(**arguments | changes)


def phones(kind, step):
    mods = {
        "local": [local_noise_mod(dataset="phone")],
        "distributed": [secure_aggregation_mod, noise_share_mod(dataset="phone", delta=DELTA)],
    }[kind]
    client = ClientApp(mods=mods)

    @client.train()
    def train(received, ctx):
        del ctx
        arrays = {k: Array(a.numpy() + step) for k, a in received.content[records.ARRAYS].items()}
        return type(received)(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=received)

    return client


def run(kind, it, *, rounds=1, size=16, step=0.01, fault=None):
    grid = InProcessGrid(phones(kind, step), num_supernodes=NODES, fault=fault)
    with grid:
        model = ArrayRecord({"w": Array(np.zeros(size))})
        return it.start(grid=grid, initial_arrays=model, num_rounds=rounds)


def from_round_2(number):
    """Nodes that answer nothing once their app has been asked for so many rounds' messages."""
    seen: dict[int, int] = {}

    def fault(asked):
        node = asked.metadata.dst_node_id
        seen[node] = seen.get(node, 0) + 1
        return Fault.SILENT if seen[node] > number else None

    return fault


MESSAGES = {"distributed": 5, "local": 1}
"""Of one round, to each node."""


@pytest.mark.parametrize("kind", STARTED_LIKE_FLOWERS)
def test_start_takes_what_flowers_takes(kind):
    flowers = inspect.signature(Strategy.start).parameters
    ours = inspect.signature(kind.start).parameters
    assert list(ours) == list(flowers)
    for name, parameter in flowers.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_model_is_handed_over_with_what_it_cost(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("DPFL_RUN_DIR", str(tmp_path))
    result = run(kind, strategy(kind))
    np.testing.assert_array_equal(load_model(tmp_path / MODEL)["w"], result.arrays["w"].numpy())
    spent = result.privacy or result.node_privacy
    assert str(spent).encode()[:40] in (tmp_path / MODEL).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_gives_up_hands_over_what_it_had_released_and_spent(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("DPFL_RUN_DIR", str(tmp_path))
    it = strategy(kind, give_up_after=2)
    with pytest.raises(AllClientsFailed) as failed:
        run(kind, it, rounds=9, fault=from_round_2(MESSAGES[kind]))
    result = failed.value.result
    assert result.stopped is Stopped.ALL_CLIENTS_FAILED
    assert np.abs(result.arrays["w"].numpy()).min() > 0  # of the one round that was released
    np.testing.assert_array_equal(load_model(tmp_path / MODEL)["w"], result.arrays["w"].numpy())
    assert set(result.signal_to_noise) == {1}
    if kind == "local":
        assert [len(c.events) for c in result.node_privacy.claims.values()] == [1] * NODES
    else:
        assert result.privacy.releases == result.rounds == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_round_tells_epsilon_of_the_budget_and_the_signal(kind, caplog):
    relation = "replace-one" if kind == "local" else "zero-out"
    budget = PrivacyBudget(4.0, DELTA, "node", relation)
    with caplog.at_level(logging.INFO, logger="flwr.dpfl"):
        result = run(kind, strategy(kind, budget=budget), rounds=2)
    lines = [record.getMessage() for record in caplog.records]
    rounds = [found for found in map(RoundProgress.parse, lines) if found is not None]
    assert [found.server_round for found in rounds] == [1, 2]
    assert [found.budget for found in rounds] == [4.0, 4.0]
    assert rounds[0].epsilon < rounds[1].epsilon <= 4.0
    spent = result.privacy.epsilon if result.privacy else result.node_privacy.worst.epsilon
    assert rounds[1].epsilon == pytest.approx(spent, rel=0.01)
    for found in rounds:
        shown = result.signal_to_noise[found.server_round]
        assert found.metrics["signal-to-noise"] == pytest.approx(shown, rel=0.05)


def test_a_round_in_which_nothing_is_released_has_no_signal(caplog):
    with caplog.at_level(logging.INFO, logger="flwr.dpfl"):
        for kind, said in (("distributed", "nothing released"), ("local", "nobody answered")):
            it = strategy(kind, give_up_after=None)
            result = run(kind, it, rounds=2, fault=from_round_2(MESSAGES[kind]))
            assert set(result.signal_to_noise) == {1}
            assert f"{said}, about" in caplog.text


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("distributed", "discrete-gaussian"),
        ("distributed", "skellam"),
        ("local", "gaussian"),
        ("local", "laplace"),
    ],
)
@pytest.mark.parametrize("gone", [0, 1])
def test_the_signal_is_told_from_released_values_and_all_noise_that_is_in_them(kind, noise, gone):
    # d entries moved by x each by m of 4 nodes, whose shares or noise add up: power
    # m^2 x^2 / (m s^2) for a share of s. The estimate's deviation is at most
    # sqrt((5 + 4 power) / d), Laplace's fourth moment included; 8 of them are allowed for.
    size = 1_500 if noise == "laplace" else 20_000
    small = {"noise_multiplier": 3e-4} if noise == "laplace" else {"noise_multiplier": 0.01}
    it = strategy(kind, noise=noise, max_inflation=1.1, **small)

    def fault(asked):
        return Fault.SILENT if asked.metadata.dst_node_id - 1000 < gone else None

    kept = {}

    def evaluate(server_round, arrays):
        del arrays
        if kind == "local" and server_round == 0:
            law = it.noise.distribution(it.noise.grid(size))
            kept["stddev"] = law.stddev * it.noise.grid(size).unit_size(CLIP)
        elif server_round == 0:
            plan = it.plan
            kept["stddev"] = plan.share.stddev * plan.grid.unit_size(CLIP)
            assert it.noise_multiplier == plan.noise_multiplier

    step = 0.005 if noise == "laplace" else 0.05  # within the clip norm
    grid = InProcessGrid(phones(kind, step), num_supernodes=NODES, fault=fault)
    with grid:
        model = ArrayRecord({"w": Array(np.zeros(size))})
        result = it.start(grid, model, num_rounds=1, evaluate_fn=evaluate)
    assert it.clip_norm == CLIP
    present = NODES - gone
    power = present * step**2 / kept["stddev"] ** 2
    tolerance = 8 * math.sqrt((5 + 4 * power) / size)
    assert power > 2 * tolerance  # else another scale of the noise would pass
    assert result.signal_to_noise[1] == pytest.approx(power, abs=tolerance)


def test_what_is_nothing_but_noise_has_no_signal_and_no_noise_is_all_signal():
    noise = np.random.default_rng(5).normal(0, 2.0, 100_000)
    assert signal_to_noise(noise, noise_stddev=2.0) < 8 * math.sqrt(2 / noise.size)
    assert signal_to_noise(noise, noise_stddev=1.8) > 0.2
    assert signal_to_noise(noise, noise_stddev=0.0) == math.inf
