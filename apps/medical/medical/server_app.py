"""What runs at the coordinator: it averages, counts rounds, and reports what was spent."""

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling, PrivacyBudget
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.final_model import save_model
from dpfl_flower.secagg import SecAggPlus
from dpfl_strategies import (
    AllClientsFailed,
    DistributedDPFedAvg,
    FedAvgM,
    NodeClaim,
    NodePrivacyReport,
    SampleLevelFedAvg,
)
from dpfl_strategies.node_privacy import read_claim

from .evaluation import ScoreHistogram
from .hospital import SAMPLE
from .patients import HOSPITALS
from .reference import reference_histograms
from .report import HospitalReport, Report
from .settings import Settings, Trust
from .task import new_model

log = logging.getLogger("flwr.medical")

app = ServerApp()

_EVALUATION_SECONDS = 600.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, evaluate once, write the report and print it."""
    report = train(grid, Settings.parse(context.run_config), run_id=context.run_id)
    print(report.table(), flush=True)


def train(grid: Grid, settings: Settings, *, run_id: int) -> Report:
    """Run the app on ``grid``; return the report, which is also in the run directory.

    Raises
    ------
    RuntimeError
        If no hospital trains, for instance because their budgets are spent.
    """
    log.info("Run directory: %s", settings.run_dir.absolute())
    strategy = _strategy(settings)
    average = IterateAverage(first_round=settings.num_rounds // 2 + 1)
    try:
        result = strategy.start(
            grid,
            ArrayRecord(new_model().state_dict()),
            num_rounds=settings.num_rounds,
            evaluate_fn=average.observe,
        )
    except AllClientsFailed as failed:
        raise RuntimeError(
            f"no hospital trains: {failed}. Error code 111 above means that a hospital's budget "
            f"(epsilon {settings.target_epsilon:g} at delta {settings.target_delta:g}) is spent: "
            f"its ledger, for the packaged sample in {settings.run_dir.absolute()}, counts all "
            "runs on its patients"
        ) from failed
    model = average.mean()
    nodes = grid.get_node_ids() if result.node_privacy is None else result.node_privacy.claims
    histograms, claims = evaluate(grid, model, nodes)
    privacy = result.node_privacy or NodePrivacyReport(claims)
    save_model(model, settings.run_dir, notes={"privacy": str(privacy)})
    report = _report(
        settings,
        privacy,
        histograms,
        run_id=run_id,
        rounds=result.rounds,
    )
    log.info("Result: %s", report.save(settings.run_dir).absolute())
    return report


def _strategy(settings: Settings) -> SampleLevelFedAvg | DistributedDPFedAvg:
    if settings.trust is Trust.LOCAL:
        return SampleLevelFedAvg(
            population=settings.num_hospitals,
            server_optimizer=FedAvgM(lr=1.0, momentum=settings.server_momentum),
        )
    return DistributedDPFedAvg(
        budget=PrivacyBudget(settings.target_epsilon, settings.target_delta, "example"),
        sampling=EveryoneSampling(round(settings.num_hospitals * settings.expected_patients)),
        clipping=FixedClipping(settings.clip_norm),
        num_nodes=settings.num_hospitals,
        secure_aggregation=SecAggPlus(min_cohort=settings.min_hospitals, rosters=settings.rosters),
        server_optimizer=FedAvgM(lr=settings.learning_rate, momentum=settings.server_momentum),
        dataset=SAMPLE,
    )


class IterateAverage:
    """The mean of the models released from a round on: post-processing, which costs no privacy.

    Noise that moved the model back and forth averages out of it.
    """

    def __init__(self, *, first_round: int) -> None:
        self._first_round = first_round
        self._count = 0
        self._sums: dict[str, NDArray[np.float64]] = {}

    def observe(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Take in the model of a round."""
        if server_round >= self._first_round:
            self._count += 1
            for name, array in arrays.items():
                self._sums[name] = self._sums.get(name, 0.0) + array.numpy().astype(np.float64)
        return None

    def mean(self) -> ArrayRecord:
        """Return the mean; raise RuntimeError before there is a model to average."""
        if not self._count:
            raise RuntimeError(f"no model of round {self._first_round} or later was released")
        return ArrayRecord(
            {
                name: Array((total / self._count).astype(np.float32))
                for name, total in self._sums.items()
            }
        )


def evaluate(
    grid: Grid, model: ArrayRecord, nodes: Iterable[int]
) -> tuple[Mapping[int, ScoreHistogram], Mapping[int, NodeClaim]]:
    """Ask each node once for its held-out patients' scores under ``model``. NOT PRIVATE.

    Under distributed trust nodes also say what their patients have spent.
    """
    messages = [
        Message(RecordDict({records.ARRAYS: model}), node, MessageType.EVALUATE) for node in nodes
    ]
    found: dict[int, ScoreHistogram] = {}
    claims: dict[int, NodeClaim] = {}
    for reply in grid.send_and_receive(messages, timeout=_EVALUATION_SECONDS):
        node = reply.metadata.src_node_id
        if reply.has_error():
            log.warning("Node %d shares no evaluation", node)
            continue
        if records.PRIVACY in reply.content.config_records:
            claim = read_claim(node, reply.content.config_records[records.PRIVACY])
            claims.update({} if claim is None else {node: claim})
        try:
            found[node] = ScoreHistogram.from_metrics(reply.content[records.METRICS])
        except (ValueError, KeyError, TypeError):
            log.warning("Node %d shares no evaluation", node)
    return found, claims


def _report(
    settings: Settings,
    privacy: NodePrivacyReport,
    histograms: Mapping[int, ScoreHistogram],
    *,
    run_id: int,
    rounds: int,
) -> Report:
    claims = dict(sorted(privacy.claims.items(), key=lambda item: item[1].dataset))
    reference: dict[str, ScoreHistogram] = {}
    if {claim.dataset for claim in claims.values()} <= {f"{SAMPLE}/{name}" for name in HOSPITALS}:
        reference = {f"{SAMPLE}/{k}": h for k, h in reference_histograms(settings).items()}
    worst = privacy.worst
    if worst is None:
        raise RuntimeError("no hospital made a privacy claim")
    return Report(
        run_id=run_id,
        rounds=rounds,
        split_seed=settings.split_seed,
        unit=str(worst.unit),
        relation=str(worst.relation),
        delta=privacy.delta,
        worst_epsilon=worst.epsilon,
        epsilon_everywhere=privacy.epsilon_everywhere(),
        hospitals=tuple(
            HospitalReport(
                dataset=claim.dataset,
                epsilon=claim.epsilon,
                delta=claim.delta,
                durable=claim.durable,
                not_private_auc=histograms.get(node, ScoreHistogram.empty()).auc,
                not_private_reference_auc=reference.get(claim.dataset, ScoreHistogram.empty()).auc,
                cryptographic=claim.cryptographic,
            )
            for node, claim in claims.items()
        ),
        expected_hospitals=settings.num_hospitals,
        not_private_auc=sum(histograms.values(), ScoreHistogram.empty()).auc,
        not_private_reference_auc=sum(reference.values(), ScoreHistogram.empty()).auc,
    )
