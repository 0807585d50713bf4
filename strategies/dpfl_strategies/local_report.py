"""What the operator of a run with local noise reads while it goes on.

>>> from dpfl_flower.accounting import PrivacyBudget
>>> from dpfl_flower.clipping import FixedClipping
>>> from dpfl_strategies.server_optimizers import FedAvg
>>> plan = LocalPlan.parse(
...     sampling=None, clipping=FixedClipping(0.5), num_nodes=100,
...     budget=PrivacyBudget(8.0, delta=1e-5, unit="node", relation="replace-one"),
...     noise_multiplier=None, delta=None, unit=None, relation=None, law="gaussian",
...     max_inflation=1.01,
... )
>>> LocalReport(plan, FedAvg()).progress(1, largest=1.7)
'worst node at epsilon 1.7 of 8, nobody answered'
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import PrivacyUnit, TrustModel
from dpfl_flower.client.local_noise import LocalNoise
from dpfl_flower.client.local_request import LocalRequest
from dpfl_strategies.claimed_sums import ClaimedSums
from dpfl_strategies.local_plan import LocalPlan
from dpfl_strategies.run_report import epsilon_of
from dpfl_strategies.server_optimizers import ServerOptimizer
from dpfl_strategies.signal_to_noise import signal_to_noise

__all__ = ["LocalReport"]

log = logging.getLogger("flwr.dpfl")


@dataclass(frozen=True)
class LocalReport:
    """Log lines about a run: what will be done, and what has been spent so far.

    Attributes
    ----------
    plan : LocalPlan
    server_optimizer : ServerOptimizer
    signal_to_noise : dict of int to float
        By round: a released value over the noise in it.
    """

    plan: LocalPlan
    server_optimizer: ServerOptimizer
    signal_to_noise: dict[int, float] = field(default_factory=dict)

    def summary(self, noise: LocalNoise | None, *, secure: ClaimedSums | None = None) -> None:
        """Log what will be done."""
        request = self.plan.request
        log.info("\t├──> Unit: %s, relation: %s", request.unit, request.relation)
        if request.unit is not PrivacyUnit.NODE:
            log.info("\t├──> Sampling: %s, drawn inside the nodes", request.sampling)
        log.info("\t├──> Clipping: %s", self.plan.clipping)
        log.info("\t├──> Trust: %s", TrustModel.LOCAL)
        if secure is not None:
            log.info("\t├──> The server sees sums only: %r", secure)
        if noise is not None:
            log.info("\t├──> Noise: %s, multiplier %.4f", noise.law, noise.noise_multiplier)
        log.info("\t├──> Server optimizer: %s", self.server_optimizer)
        log.info("\t└──> Budget of each node: %s", request.budget or "none")

    def averaged(self, mean: NDArray[np.float64], request: LocalRequest, *, answers: int) -> None:
        """Note a round's mean of so many answers, each of which holds all of a node's noise."""
        variance = request.noise.distribution(request.grid).variance
        units = request.grid.unit_size(request.noise.clip_norm) / self.plan.expected_units
        self.signal_to_noise[request.server_round] = signal_to_noise(
            mean, noise_stddev=math.sqrt(answers * variance) * units
        )

    def progress(self, server_round: int, *, largest: float) -> str:
        """Return a few words on the largest epsilon that a node claims, and what came of it."""
        spent = f"worst node at {epsilon_of(largest, self.plan.request.budget)}"
        signal = self.signal_to_noise.get(server_round)
        if signal is None:
            return f"{spent}, nobody answered"
        return f"{spent}, signal-to-noise {signal:.2g}"
