"""Local noise on Flower's virtual client engine: ``python -m tests.support.<this> OUT``.

A process of its own, because Ray leaves warnings behind that pytest would take for the tests'.
"""

import json
import sys
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client import local_noise_mod
from dpfl_flower.client.users import UserCohort, user_cohort_app
from dpfl_flower.clipping import FixedClipping
from dpfl_strategies import LocalDPFedAvg

NODES = 3
USERS = 10
ROUNDS = 2
STEP = 0.01
SIZE = 5000
NOISE_MULTIPLIER = 0.5
"""So little that the users' mean shows, and not so little that there is no epsilon."""


def strategy(unit: str) -> LocalDPFedAvg:
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


def train(message: Message, context: Context) -> Message:
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


class Both(ClientApp):
    """Asks the one app or the other, as the plan for the noise says."""

    def __call__(self, message: Message, context: Context) -> Message:
        unit = str(message.content["local"]["unit"])
        mod = local_noise_mod(dataset=unit)
        app = user_cohort_app(cohort, mods=[mod]) if unit == "user" else ClientApp()
        if unit == "node":
            app.train(mods=[mod])(train)
        return app(message, context)


def main(out: str) -> None:
    """Run both on one engine, one after the other, and save what came of them."""
    server = ServerApp()

    @server.main()
    def server_main(grid: Grid, context: Context) -> None:
        del context
        found = {}
        for unit in ("node", "user"):
            start = ArrayRecord({"w": Array(np.zeros(SIZE))})
            result = strategy(unit).start(grid, start, num_rounds=ROUNDS, timeout=300)
            claims = result.node_privacy.claims.values()
            found[unit] = {
                "mean": float(result.arrays["w"].numpy().mean()),
                "epsilons": [claim.epsilon for claim in claims],
                "units": [str(claim.unit) for claim in claims],
                "releases": [claim.events[0].count for claim in claims],
            }
        Path(out).write_text(json.dumps(found))

    run_simulation(
        server,
        Both(),
        num_supernodes=NODES,
        backend_config={"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1.0}},
    )


if __name__ == "__main__":
    main(sys.argv[1])
