"""What a private run returns: Flower's result, what it cost, and why it ended."""

from dataclasses import dataclass, field
from enum import StrEnum

from flwr.serverapp.strategy import Result

from dpfl_flower.accounting import PrivacyStatement, ShuffledStatement
from dpfl_strategies.node_privacy import NodePrivacyReport


class Stopped(StrEnum):
    """Why a run ended."""

    ALL_ROUNDS_DONE = "all planned rounds are done"
    BUDGET_SPENT = "the privacy budget does not allow another round"
    ALL_CLIENTS_FAILED = "every node that was asked failed"


@dataclass(repr=False)
class PrivateResult(Result):
    """Flower's :class:`Result` with the privacy statement of the run.

    Attributes
    ----------
    privacy:
        What the data set has spent, None where the noise was seeded (such noise protects nobody)
        or where the nodes account for themselves (then see ``node_privacy``).
    node_privacy:
        Per-node claims, for strategies whose nodes add their own noise.
    shuffled:
        What holds beside that where the user says that a shuffler stood between, else None.
    metrics_not_covered:
        Whether client metrics were let through: no epsilon covers those.
    metric_noise:
        Standard deviation of the noise on the mean of each noised metric in
        ``train_metrics_clientapp``, before it is clipped to its range, in the metric's own units;
        epsilon covers those. Of the noise alone: under Poisson sampling the cohort's varying size
        adds to a mean's error, see :class:`~dpfl_strategies.noised_metrics.NoisedMetrics`.
    stopped:
        Why the run ended.
    rounds:
        Rounds whose model was released, counted from the start of the run, resumed parts included.
    signal_to_noise:
        By round, an estimate of the released mean's power over that of its noise: see
        :func:`~dpfl_strategies.signal_to_noise.signal_to_noise`. No entry for a round that released
        nothing; empty where only the nodes know their noise (``SampleLevelFedAvg``).
    """

    privacy: PrivacyStatement | None = None
    node_privacy: NodePrivacyReport | None = None
    shuffled: ShuffledStatement | None = None
    metrics_not_covered: bool = False
    metric_noise: dict[str, float] = field(default_factory=dict)
    stopped: Stopped = Stopped.ALL_ROUNDS_DONE
    rounds: int = 0
    signal_to_noise: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Flower's text, then the privacy statement."""
        spent = self.privacy or self.node_privacy
        claim = "none is claimed (the noise was seeded)" if spent is None else str(spent)
        if self.metrics_not_covered:
            claim += "; client metrics were let through, NOT PRIVATE, and are not covered"
        ended = f"Ended after {self.rounds} rounds: {self.stopped}"
        if self.shuffled is not None:
            ended = f"Shuffled: {self.shuffled}\n{ended}"
        return f"{super().__repr__()}\nPrivacy: {claim}\n{ended}\n"
