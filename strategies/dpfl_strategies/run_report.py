"""What the operator of a private run reads while it goes on."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dpfl_flower.accounting import Ledger, PrivacyBudget
from dpfl_flower.accounting.statement import rounded_up
from dpfl_strategies.gathering import Gathering
from dpfl_strategies.private_run import PrivatePlan, PrivateRun
from dpfl_strategies.signal_to_noise import in_words

__all__ = ["RunReport", "epsilon_of", "is_priced", "spent_so_far", "with_noise"]

log = logging.getLogger("flwr.dpfl")

_LOUDEST: Final = 0.25
"""Above this share of its range, the noise on a mean leaves next to nothing of it."""


def is_priced(server_round: int, num_rounds: int) -> bool:
    """Whether this round's line tells epsilon: every tenth and the last, since pricing takes time.

    >>> [server_round for server_round in range(1, 26) if is_priced(server_round, 25)]
    [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25]
    """
    return server_round % max(1, num_rounds // 10) == 0 or server_round == num_rounds


def spent_so_far(ledger: Ledger, server_round: int, num_rounds: int) -> float:
    """Return the ledger's epsilon, and before the last round up to a thousandth more."""
    return ledger.epsilon() if server_round == num_rounds else ledger.quick_epsilon()


def epsilon_of(epsilon: float, budget: PrivacyBudget | None) -> str:
    """Return epsilon as a round's line shows it.

    >>> epsilon_of(0.4019, PrivacyBudget(2.0, 1e-5))
    'epsilon 0.402 of 2'
    """
    spent = f"epsilon {rounded_up(epsilon)}"
    return spent if budget is None else f"{spent} of {budget.epsilon:g}"


def with_noise(value: float, stddev: float) -> str:
    """Return a noised value as a round's line shows it: no digits that are noise alone.

    >>> with_noise(0.95441, 0.0504), with_noise(0.95441, 0.891), with_noise(0.95441, 0.0)
    ('0.954 ± 0.05', '0.95 ± 0.89', '0.9544')
    """
    if not stddev:
        return f"{value:.4g}"
    digits = _magnitude(value) - _magnitude(stddev) + 2
    return f"{value:.{min(max(digits, 1), 15)}g} ± {stddev:.2g}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else -1


@dataclass
class RunReport:
    """Log lines about a run: what will be done, and what has been spent so far.

    Attributes
    ----------
    plan : PrivatePlan
    signal_to_noise : dict of int to float
        By round: a released value over the noise in it.
    metrics : dict of int to mapping of str to float
        By round: the released means of noised metrics.
    """

    plan: PrivatePlan
    signal_to_noise: dict[int, float] = field(default_factory=dict)
    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def summary(self, run: PrivateRun | None, gathering: Gathering, *, metrics: bool) -> None:
        """Log what will be done; ``metrics`` tells whether client metrics are let through."""
        request = self.plan.request
        log.info("\t├──> Unit: %s, relation: %s", request.unit, request.relation)
        log.info("\t├──> Sampling: %s", request.sampling)
        log.info("\t├──> Clipping: %s", self.plan.clipping)
        log.info("\t├──> Trust: %s", gathering.trust)
        if run is not None:
            log.info("\t├──> Noise multiplier: %.4f", run.noise_multiplier)
            for name, stddev in run.metric_noise.items():
                log.info("\t├──> Mean %s: noise with a standard deviation of %.2g", name, stddev)
            self._warn_of_noise(run.metric_noise)
        if not self.plan.rng.protects:
            log.warning("\t├──> The noise is seeded: it protects nobody, no epsilon is reported")
        if metrics:
            log.warning("\t├──> Client metrics are let through: NOT PRIVATE")
        else:
            log.info("\t├──> No node is asked to evaluate: evaluate_fn= of start() does so here")
        budget = request.budget if run is None else run.ledger.budget
        log.info("\t└──> Budget: %s", budget or "none")

    def _warn_of_noise(self, metric_noise: Mapping[str, float]) -> None:
        ranges = self.plan.ranges
        for name, low, high in zip(ranges.names, ranges.lows, ranges.highs, strict=True):
            if metric_noise[name] > _LOUDEST * (high - low):
                log.warning(
                    "\t├──> Mean %s will be little but noise: of a standard deviation of %.2g,"
                    " where the range is %g to %g. More nodes in a round, a larger share= of"
                    " NoisedMetrics or fewer metrics lower it; a narrower range scales it down",
                    name,
                    metric_noise[name],
                    low,
                    high,
                )

    def progress(self, run: PrivateRun, server_round: int, num_rounds: int) -> str:
        """Return a few words on what was spent and what came of it."""
        parts = [
            self._spent(run, server_round, num_rounds),
            in_words(self.signal_to_noise.get(server_round)),
        ]
        for name, value in self.metrics.get(server_round, {}).items():
            parts.append(f"{name} {with_noise(value, run.metric_noise[name])}")
        return ", ".join(parts)

    def _spent(self, run: PrivateRun, server_round: int, num_rounds: int) -> str:
        if not self.plan.rng.protects:
            return "no epsilon: the noise is seeded"
        if not is_priced(server_round, num_rounds):
            return f"{server_round} releases charged"
        return epsilon_of(
            spent_so_far(run.ledger, server_round, num_rounds), self.plan.request.budget
        )
