"""What runs at a client: nothing, as one node or as one of many users inside a node."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.users import UserCohort, user_cohort_app


def unchanged(arrays: Mapping[str, NDArray[Any]], data: None) -> Mapping[str, NDArray[Any]]:
    """Train nothing."""
    return arrays


def cohort_fn(context: Context) -> UserCohort:
    """Return the node's share of the clients."""
    nodes, clients = int(context.run_config["nodes"]), int(context.run_config["clients"])
    share = range(int(context.node_config["partition-id"]), clients, nodes)
    return UserCohort(dict.fromkeys(share), local_update=unchanged)


users = user_cohort_app(cohort_fn)
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer for a node's users where the server asks for a cohort, else send a model back."""
    if records.COHORT in message.content:
        return users(message, context)
    content = RecordDict(
        {
            records.ARRAYS: _ready(int(context.run_config["parameters"])),
            records.METRICS: MetricRecord({records.NUM_EXAMPLES: 1}),
        }
    )
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def _ready(parameters: int) -> ArrayRecord:
    """Return a model made once: sent back unchanged, Flower's wrapper would divide by zero."""
    return ArrayRecord({"weight": Array(np.full(parameters, 1e-3, np.float32))})
