"""A run whose model is the same, to the last bit, with secure aggregation and without."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.wire import decode_request
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg

WIDTH = 300

DROPOUTS: Final[Mapping[int, Mapping[int, Stage]]] = {
    2: {0: Stage.ADVERTISE, 1: Stage.MASK},
    3: {2: Stage.SHARE},
    4: {3: Stage.UNMASK},
    5: {4: Stage.MASK, 5: Stage.UNMASK},
}
"""By round: which of six nodes drops out at which stage."""


def dropping(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Drop out as `DROPOUTS` says; outside of secure aggregation, unless the vector is sent."""
    config = message.content.config_records
    node = int(context.node_config["partition-id"])
    if "secagg" in config:
        request = decode_request(message.content)
        if DROPOUTS.get(request.server_round, {}).get(node) is request.stage:
            raise RuntimeError("planted")
    elif DROPOUTS.get(int(config["config"]["server-round"]), {}).get(node, Stage.UNMASK) != (
        Stage.UNMASK
    ):
        raise RuntimeError("planted")
    return call_next(message, context)


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


def in_process(*, nodes: int, rounds: int, dropouts: bool = False) -> np.ndarray:
    """Return what the run without secure aggregation gives, in this process."""
    app = ClientApp()
    app.train(mods=[dropping] if dropouts else [])(train)
    with InProcessGrid(app, num_supernodes=nodes) as grid:
        return run(grid, nodes=nodes, rounds=rounds, secure_aggregation=None)


def require_plain_sums(model: np.ndarray, *, nodes: int, rounds: int) -> None:
    """Require the model of the same survivors without masks, and that the dropouts count."""
    expected = in_process(nodes=nodes, rounds=rounds, dropouts=True)
    np.testing.assert_array_equal(model, expected)
    assert np.any(model != in_process(nodes=nodes, rounds=rounds))
