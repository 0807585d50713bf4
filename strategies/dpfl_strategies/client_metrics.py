"""Metrics that clients compute on their own data: dropped, or let through under their true name."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import StrEnum

from flwr.app import Message, MetricRecord, RecordDict

from dpfl_flower import checks, records
from dpfl_flower.rng import secure
from dpfl_strategies.noised_metrics import NoisedMetrics
from dpfl_strategies.replies import accepted

log = logging.getLogger("flwr.dpfl")

NOT_PRIVATE_PREFIX = "not_private/"

AggregateMetrics = Callable[[list[RecordDict], str], MetricRecord]


class ClientMetrics(StrEnum):
    """What becomes of the metrics in client replies.

    They carry no noise, so each one is a leak that the ledger does not know of. ``DROPPED`` (the
    default) never looks at them; ``NOT_PRIVATE`` combines them and marks every name with
    ``not_private/``. :class:`~dpfl_strategies.noised_metrics.NoisedMetrics` is the private way.
    """

    DROPPED = "none"
    NOT_PRIVATE = "not_private"


def weighted_mean(contents: Sequence[RecordDict], weighted_by: str) -> MetricRecord:
    """Average each numeric metric over the replies that hold it, weighted by ``weighted_by``."""
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    for content in contents:
        for record in content.metric_records.values():
            weight = _number(record.get(weighted_by, 1))
            if weight is None or weight <= 0:
                continue
            for name, metric in record.items():
                value = _number(metric)
                if name != weighted_by and value is not None:
                    totals[name] = totals.get(name, 0.0) + weight * value
                    weights[name] = weights.get(name, 0.0) + weight
    return MetricRecord({name: totals[name] / weights[name] for name in totals})


def _number(value: object) -> float | None:
    """Return a metric as a float, None where it is no number or larger than a float holds."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def without_noise(policy: object) -> ClientMetrics:
    """Return what becomes of metrics where nodes add their own noise; ValueError for another."""
    if isinstance(policy, NoisedMetrics):
        raise ValueError(
            f"metrics={policy!r} must be 'none' or 'not_private' where nodes add their own noise: "
            "it is in their models alone, and the server adds none that would cover what they "
            "report"
        )
    return checks.choice(ClientMetrics, metrics=policy)


def _policy_of(policy: object) -> ClientMetrics:
    if not (isinstance(policy, str) and policy in list(ClientMetrics)):
        raise ValueError(
            f"metrics={policy!r} must be 'none', 'not_private' or NoisedMetrics({{name: (low, "
            "high)})"
        )
    return ClientMetrics(policy)


class MetricsGate:
    """Lets client metrics through or not, and asks for evaluations only where it does.

    Parameters
    ----------
    policy:
        ``"none"`` or ``"not_private"``. `NoisedMetrics` too lets nothing through of replies: what
        they bound rides in the sum.
    fraction_evaluate:
        Share of the population asked to evaluate each round, in (0, 1].
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn:
        As in Flower: given the replies' contents and the weight key, return one MetricRecord.
    """

    def __init__(
        self,
        policy: ClientMetrics | NoisedMetrics | str,
        *,
        fraction_evaluate: float = 1.0,
        train_metrics_aggr_fn: AggregateMetrics | None = None,
        evaluate_metrics_aggr_fn: AggregateMetrics | None = None,
    ) -> None:
        noised = isinstance(policy, NoisedMetrics)
        self._policy = ClientMetrics.DROPPED if noised else _policy_of(policy)
        checks.fraction(fraction_evaluate=fraction_evaluate)
        own = train_metrics_aggr_fn or evaluate_metrics_aggr_fn
        if not self.open and own is not None:
            reason = "what clients report carries no noise and is dropped"
            if noised:
                reason = "of NoisedMetrics the means come out, and no single report to combine"
            raise ValueError(
                "train_metrics_aggr_fn and evaluate_metrics_aggr_fn must be None without "
                f"metrics='not_private': {reason}"
            )
        self._fraction_evaluate = fraction_evaluate
        self._train = train_metrics_aggr_fn or weighted_mean
        self._evaluate = evaluate_metrics_aggr_fn or weighted_mean

    @property
    def open(self) -> bool:
        """Whether metrics are let through, as not private."""
        return self._policy is ClientMetrics.NOT_PRIVATE

    def evaluators(self, population: Sequence[int]) -> list[int]:
        """Return the nodes to ask for an evaluation: none where metrics are dropped."""
        if not self.open:
            return []
        count = max(1, round(self._fraction_evaluate * len(population)))
        return secure().sample(population, count)

    def of_training(self, contents: Sequence[RecordDict]) -> MetricRecord | None:
        """Return the marked metrics of training replies, None where dropped or absent."""
        return self._marked(contents, self._train)

    def of_evaluation(
        self, replies: Iterable[Message], *, asked: Collection[int], group: str
    ) -> MetricRecord | None:
        """Return the marked metrics of evaluation replies, None where dropped or absent."""
        contents = [reply.content for reply in accepted(replies, asked=asked, group=group)]
        return self._marked(contents, self._evaluate)

    def _marked(
        self, contents: Sequence[RecordDict], aggregate: AggregateMetrics
    ) -> MetricRecord | None:
        if not self.open or not contents:
            return None
        try:
            merged = aggregate(list(contents), records.NUM_EXAMPLES)
        except Exception as failed:  # what one node reports must not end the run
            log.warning("Client metrics could not be combined (%s)", type(failed).__name__)
            return None
        return MetricRecord({NOT_PRIVATE_PREFIX + name: value for name, value in merged.items()})
