"""What the operator of a run of DP-SGD nodes reads while it goes on.

>>> report = SampleLevelReport(population=4)
>>> report.averaged(1, answers=3)
>>> report.progress(1, largest=0.7, cryptographic=True)
'worst node at epsilon 0.7'
>>> report.progress(2, largest=0.7, cryptographic=True)
'worst node at epsilon 0.7, nothing released'
"""

import logging
from dataclasses import dataclass, field

from dpfl_flower.accounting.statement import noise_caveat, rounded_up
from dpfl_strategies.secure_average import SecureAverage
from dpfl_strategies.server_optimizers import ServerOptimizer
from dpfl_strategies.signal_to_noise import in_words

__all__ = ["SampleLevelReport"]

log = logging.getLogger("flwr.dpfl")


@dataclass
class SampleLevelReport:
    """Log lines about a run: what will be done, what nodes claim, and whether a mean came of it.

    Attributes
    ----------
    population : int
        How many nodes are asked.
    answers : dict of int to int
        By round, how many nodes' answers are in the mean; no entry for an abandoned round.
    """

    population: int
    answers: dict[int, int] = field(default_factory=dict)

    def summary(
        self, secure: SecureAverage | None, server_optimizer: ServerOptimizer, *, metrics: bool
    ) -> None:
        """Log what will be done; ``metrics`` tells whether client metrics are let through."""
        log.info("\t├──> Every node trains with DP-SGD and adds its own noise")
        if secure is not None:
            log.info("\t├──> The server sees sums only: %r", secure)
        if metrics:
            log.warning("\t├──> Client metrics are let through: NOT PRIVATE")
        log.info("\t└──> Server optimizer: %s", server_optimizer)

    def averaged(self, server_round: int, *, answers: int) -> None:
        """Note that a round's mean is that of so many answers, and log it where that is news."""
        before = list(self.answers.values())[-1:]
        self.answers[server_round] = answers
        if before != [answers]:
            log.info(
                "NOT PRIVATE: from round %d the mean is that of %d of %d nodes",
                server_round,
                answers,
                self.population,
            )

    def progress(self, server_round: int, *, largest: float, cryptographic: bool) -> str:
        """Return a few words on the largest epsilon that a node claims, and what came of it."""
        spent = f"worst node at epsilon {rounded_up(largest)}"
        spent += noise_caveat(cryptographic=cryptographic)
        if server_round not in self.answers:
            return f"{spent}, {in_words(None)}"
        return spent if self.answers[server_round] else f"{spent}, nobody answered"
