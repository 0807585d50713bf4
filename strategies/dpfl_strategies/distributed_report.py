"""What the operator of a run with distributed noise reads while it goes on.

>>> from dpfl_flower.accounting import EveryoneSampling
>>> from dpfl_strategies.server_optimizers import FedAvg
>>> request = PrivacyRequest.parse(
...     sampling=EveryoneSampling(4), budget=None, noise_multiplier=1.0, delta=1e-5, unit="node",
...     relation="zero-out",
... )
>>> DistributedReport(request, FixedClipping(0.5), FedAvg()).signal_to_noise
{}
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import TrustModel
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.distributed import DistributedPlan, wrap_probability
from dpfl_strategies.distributed_run import DistributedRun
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.run_report import epsilon_of, is_priced, spent_so_far
from dpfl_strategies.server_optimizers import ServerOptimizer
from dpfl_strategies.signal_to_noise import in_words, signal_to_noise

__all__ = ["DistributedReport"]

log = logging.getLogger("flwr.dpfl")


@dataclass(frozen=True)
class DistributedReport:
    """Log lines about a run: what will be done, and what has been spent so far.

    Attributes
    ----------
    request : PrivacyRequest
    clipping : FixedClipping
    server_optimizer : ServerOptimizer
    signal_to_noise : dict of int to float
        By round: a released value over the noise in it.
    """

    request: PrivacyRequest
    clipping: FixedClipping
    server_optimizer: ServerOptimizer
    signal_to_noise: dict[int, float] = field(default_factory=dict)

    def summary(self, run: DistributedRun | None) -> None:
        """Log what will be done."""
        request = self.request
        log.info("\t├──> Unit: %s, relation: %s", request.unit, request.relation)
        log.info("\t├──> Sampling: %s, not amplified", request.sampling)
        log.info("\t├──> Clipping: %s", self.clipping)
        log.info("\t├──> Trust: %s", TrustModel.DISTRIBUTED)
        if run is not None:
            plan = run.plan
            log.info(
                "\t├──> Noise: %s, multiplier %.4f from %d honest shares (%d colluders assumed)",
                plan.noise,
                plan.noise_multiplier,
                plan.honest_shares,
                plan.colluders,
            )
            log.info(
                "\t├──> Modulus: 2^%d, in which a coordinate wraps around with probability <= %.1e",
                plan.grid.bits,
                wrap_probability(plan, units=request.sampling.population),
            )
        log.info("\t├──> Server optimizer: %s", self.server_optimizer)
        budget = request.budget if run is None else run.ledger.budget
        log.info("\t└──> Budget: %s", budget or "none")

    def released(
        self, server_round: int, mean: NDArray[np.float64], plan: DistributedPlan, *, shares: int
    ) -> None:
        """Note a round's released mean, in whose sum so many nodes are.

        Each of them adds a share, which is more than the honest shares that epsilon counts on. What
        rounding adds counts as signal: on any grid but the coarsest that is next to nothing.
        """
        units = plan.grid.unit_size(plan.clip_norm) / self.request.sampling.expected_cohort
        self.signal_to_noise[server_round] = signal_to_noise(
            mean, noise_stddev=math.sqrt(shares * plan.share.variance) * units
        )

    def progress(self, run: DistributedRun, server_round: int, num_rounds: int) -> str:
        """Return a few words on what was spent and what came of it."""
        releases = run.ledger.releases
        spent = f"{releases} releases charged"
        if is_priced(server_round, num_rounds):
            spent = epsilon_of(
                spent_so_far(run.ledger, server_round, num_rounds), run.ledger.budget
            )
        return f"{spent}, {in_words(self.signal_to_noise.get(server_round))}"
