"""A run whose model is the same, to the last bit, with secure aggregation and without."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg

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


def in_process(*, nodes: int, rounds: int) -> np.ndarray:
    """Return what the run without secure aggregation gives, in this process."""
    app = ClientApp()
    app.train()(train)
    with InProcessGrid(app, num_supernodes=nodes) as grid:
        return run(grid, nodes=nodes, rounds=rounds, secure_aggregation=None)
