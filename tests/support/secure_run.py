"""A run whose model is the same, to the last bit, with secure aggregation and without."""

from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from dpfl_flower.accounting import EveryoneSampling, PoissonSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg
from tests.support.dropouts import NODES, Way, dropping

WIDTH = 300


def train(message: Message, context: Context) -> Message:
    """Move every weight by something of the node's own."""
    index = int(context.node_config["partition-id"])
    step = 0.1 * (index + 1) * np.random.default_rng(index).normal(size=WIDTH)
    weights = message.content["arrays"]["w"].numpy() + step
    arrays = ArrayRecord({"w": Array(weights.astype(np.float32))})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def run(
    grid: Grid, *, nodes: int, rounds: int, secure_aggregation: SecAggPlus | None
) -> np.ndarray:
    """Return the model after so many rounds of seeded noise."""
    strategy = DPFedAvg(
        noise_multiplier=0.5,
        noise_seed=4,
        relation="zero-out",
        sampling=EveryoneSampling(nodes),
        clipping=FixedClipping(0.5),
        secure_aggregation=secure_aggregation,
    )
    start = ArrayRecord({"w": Array(np.zeros(WIDTH, np.float32))})
    return strategy.start(grid, start, num_rounds=rounds, timeout=300).arrays["w"].numpy()


def run_units(
    grid: Grid, *, nodes: int, rounds: int = 1, secure_aggregation: SecAggPlus | None
) -> np.ndarray:
    """Return the model after rounds of integer sums of `integer_sums` and seeded noise."""
    strategy = DPFedAvg(
        noise_multiplier=0.5,
        noise_seed=4,
        unit="user",
        sampling=PoissonSampling(50, 1000),
        num_nodes=nodes,
        clipping=FixedClipping(0.5),
        secure_aggregation=secure_aggregation,
    )
    start = ArrayRecord({"w": Array(np.zeros(WIDTH, np.float32))})
    return strategy.start(grid, start, num_rounds=rounds, timeout=300).arrays["w"].numpy()


def in_process(*, nodes: int, rounds: int, ways: Sequence[Way] = ()) -> np.ndarray:
    """Return what the run without secure aggregation gives, in this process."""
    app = ClientApp()
    app.train(mods=[dropping(ways)] if ways else [])(train)
    with InProcessGrid(app, num_supernodes=nodes) as grid:
        return run(grid, nodes=nodes, rounds=rounds, secure_aggregation=None)


def require_plain_sums(model: np.ndarray, ways: Sequence[Way]) -> None:
    """Require the model of the same survivors without masks, and that the dropouts count."""
    expected = in_process(nodes=NODES, rounds=len(ways), ways=ways)
    np.testing.assert_array_equal(model, expected)
    assert np.any(model != in_process(nodes=NODES, rounds=len(ways)))
