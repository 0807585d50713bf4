"""Runs on Flower's virtual client engine: ``python -m tests.support.virtual_engine FOLDER``.

One after the other on one engine, which takes longer to start than they do, and in a process of its
own, because Ray leaves warnings behind that pytest would take for the tests'.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import nn

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client import local_noise_mod, numpy_client_app, secure_aggregation_mod
from dpfl_flower.client.users import UserCohort, user_cohort_app
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.secagg.wire import decode_request
from dpfl_strategies import LocalDPFedAvg, SampleLevelFedAvg
from tests.support import secure_run, sums_clients
from tests.support.dropouts import EVERY_WAY, NODES

# Two neighbours of five may drop out: t = 3, and 2 t > 5.
PROTOCOL = SecAggPlus(threshold=0.6)
SECURE_MODEL = "secure.npy"

MASKED_ROUND = len(EVERY_WAY) + 1
MASKED_LEDGERS = "masked"
MASKED_RESULTS = "masked.json"
MAX_UPDATE_NORM = 20.0

USERS = 10
LOCAL_ROUNDS = 2
STEP = 0.01
SIZE = 5000
NOISE_MULTIPLIER = 0.5
"""So little that the users' mean shows, and not so little that there is no epsilon."""
LOCAL_RESULTS = "local.json"

SUMS_MODELS = "sums.npz"


def move(message: Message, context: Context) -> Message:
    """Move every weight by a step."""
    del context
    arrays = {n: Array(a.numpy() + STEP) for n, a in message.content["arrays"].items()}
    return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)


def cohort(context: Context) -> UserCohort:
    """Return users who move every weight by a step."""
    del context
    return UserCohort(
        {str(i): STEP for i in range(USERS)},
        local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
    )


class AllClients(ClientApp):
    """Asks the app that the message is for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __call__(self, message: Message, context: Context) -> Message:
        return self._app_for(message.content)(message, context)

    def _app_for(self, content: RecordDict) -> ClientApp:
        if "secagg" in content:
            if decode_request(content).server_round == MASKED_ROUND:
                return self._summing(self._folder / MASKED_LEDGERS, mods=[secure_aggregation_mod])
            app = ClientApp()
            app.train(mods=[secure_run.dropping(EVERY_WAY), secure_aggregation_mod])(
                secure_run.train
            )
            return app
        if "local" in content:
            unit = str(content["local"]["unit"])
            mod = local_noise_mod(dataset=unit)
            if unit == "user":
                return user_cohort_app(cohort, mods=[mod])
            app = ClientApp()
            app.train(mods=[mod])(move)
            return app

        return self._summing(self._folder)

    @staticmethod
    def _summing(ledgers: Path, mods: Sequence[Mod] = ()) -> ClientApp:
        def client_fn(context: Context) -> object:
            config = {"ledgers": str(ledgers)}  # run_simulation has none
            return sums_clients.client_fn(dataclasses.replace(context, run_config=config))

        return numpy_client_app(client_fn, mods=mods)


def local_strategy(unit: str) -> LocalDPFedAvg:
    """Return the strategy whose units are the nodes, or the users inside them."""
    inside = {
        "relation": "add-or-remove-one",
        "sampling": EveryoneSampling(NODES * USERS),
    }
    return LocalDPFedAvg(
        noise_multiplier=NOISE_MULTIPLIER,
        delta=1e-5,
        clipping=FixedClipping(1.0),
        num_nodes=NODES,
        unit=unit,
        max_inflation=1.1,
        **(inside if unit == "user" else {}),
    )


def run_local(grid: Grid) -> dict[str, object]:
    """Return, by unit, the mean weight and what the nodes say that they spent."""
    found = {}
    for unit in ("node", "user"):
        start = ArrayRecord({"w": Array(np.zeros(SIZE))})
        result = local_strategy(unit).start(grid, start, num_rounds=LOCAL_ROUNDS, timeout=300)
        claims = result.node_privacy.claims.values()
        found[unit] = {
            "mean": float(result.arrays["w"].numpy().mean()),
            "epsilons": [claim.epsilon for claim in claims],
            "units": [str(claim.unit) for claim in claims],
            "releases": [claim.events[0].count for claim in claims],
        }
    return found


def run_masked(grid: Grid) -> dict[str, object]:
    """Return the model that DP-SGD nodes train in a masked round, and what they say they spent.

    In a loop of its own, because a node answers each round of a run once.
    """
    strategy = SampleLevelFedAvg(
        population=NODES, secure_aggregation=PROTOCOL, max_update_norm=MAX_UPDATE_NORM
    )
    start = ArrayRecord({"weight": Array(np.zeros((1, 3))), "bias": Array(np.zeros(1))})
    messages = strategy.configure_train(MASKED_ROUND, start, ConfigRecord(), grid)
    while messages is not None:
        replies = list(grid.send_and_receive(messages, timeout=300))
        messages = strategy.continue_train(MASKED_ROUND, replies)
    model, _ = strategy.aggregate_train(MASKED_ROUND, replies)
    claims = strategy.node_privacy.claims.values()
    return {
        "weight": model["weight"].numpy().ravel().tolist(),
        "releases": [claim.events[0].count for claim in claims],
        "durable": [claim.durable for claim in claims],
    }


def main(folder: Path) -> None:
    """Run all of them and save what came of them."""
    server = ServerApp()

    @server.main()
    def server_main(grid: Grid, context: Context) -> None:
        del context
        grid.pull_interval = 0.01  # this engine's grid asks ten times a second by itself
        secure = secure_run.run(
            grid, nodes=NODES, rounds=len(EVERY_WAY), secure_aggregation=PROTOCOL
        )
        np.save(folder / SECURE_MODEL, secure)
        (folder / MASKED_LEDGERS).mkdir()
        (folder / MASKED_RESULTS).write_text(json.dumps(run_masked(grid)))
        (folder / LOCAL_RESULTS).write_text(json.dumps(run_local(grid)))
        before = nn.Linear(3, 1).state_dict()
        after = sums_clients.start(grid, before).arrays
        models = {"before": before["weight"].numpy(), "after": after["weight"].numpy()}
        np.savez(folder / SUMS_MODELS, names=list(after), **models)

    run_simulation(
        server,
        AllClients(folder),
        num_supernodes=NODES,
        backend_config={"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1.0}},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
