"""What runs at the server: it adds noise to the nodes' sums, steps, and reports what was spent."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from dpfl_flower import records
from dpfl_flower.accounting import Ledger, PoissonSampling, PrivacyBudget, PrivacyUnit
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.final_model import save_model
from dpfl_flower.quantize import Rounding
from dpfl_strategies import DPFedAvg, FedAdam, PrivateResult

from .client_app import first_hour
from .district import sample_counts
from .evaluation import HELD_OUT, SENSOR_WEEK, HeldOutAnswer, SensorWeek
from .reference import Reference
from .report import Report
from .task import AbsoluteErrors, Settings, new_model

log = logging.getLogger("flwr.smart_city")

app = ServerApp()

FIGURE: Final = "week.png"
"""The file in the run directory that shows a sensor's week."""

_EVALUATION_SECONDS: Final = 600.0
_WORTH_A_RUN: Final = 0.01
"""A run needs more than this share of the budget: with less, noise is all that would be learned."""


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
        If the ledger in the run directory does not allow another run.
    AllClientsFailed
        If no node answers.
    """
    log.info("Run directory: %s", settings.run_dir.absolute())
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    result = _trained(grid, settings)
    model = result.arrays
    if model is None or result.privacy is None:
        raise RuntimeError("no model was released")
    save_model(model, settings.run_dir, notes={"privacy": str(result.privacy)})
    answers = evaluate(grid, model)
    errors = sum((answer.errors for answer in answers), AbsoluteErrors())
    packaged = len(answers) == settings.num_nodes and all(answer.packaged for answer in answers)
    spent = result.privacy
    report = Report(
        run_id=run_id,
        rounds=result.rounds,
        stopped=str(result.stopped),
        init_seed=settings.init_seed,
        dataset=spent.dataset,
        unit=str(spent.unit),
        relation=str(spent.relation),
        epsilon=spent.epsilon,
        delta=spent.delta,
        durable=spent.durable,
        nodes=len(answers),
        expected_nodes=settings.num_nodes,
        not_private_mae=errors.mae,
        not_private_held_out=errors.count,
        not_private_reference=reference() if packaged else None,
        not_private_figure=draw(grid, model, settings),
    )
    log.info("Result: %s", report.save(settings.run_dir).absolute())
    return report


def strategy_of(settings: Settings) -> DPFedAvg:
    """Return the strategy: DP-FedAvg over sensor-fortnights, many to a node."""
    return DPFedAvg(
        budget=_budget(settings),
        sampling=PoissonSampling(settings.expected_cohort, settings.num_units),
        num_nodes=settings.num_nodes,
        clipping=FixedClipping(settings.clip_norm),
        server_optimizer=FedAdam(
            lr=settings.server_learning_rate,
            beta2=settings.server_beta2,
            tau=settings.server_tau,
        ),
        rounding=Rounding.DITHERED,
        ledger=_ledger_path(settings),
        dataset=settings.dataset,
    )


def evaluate(grid: Grid, model: ArrayRecord) -> list[HeldOutAnswer]:
    """Ask each node once for its errors on held-out hours. NOT PRIVATE."""
    answers = []
    for reply in _ask(grid, model, HELD_OUT):
        try:
            answers.append(HeldOutAnswer.from_metrics(reply.content[records.METRICS]))
        except (ValueError, KeyError, TypeError):
            log.warning("Node %d shares no evaluation", reply.metadata.src_node_id)
    return answers


def draw(grid: Grid, model: ArrayRecord, settings: Settings) -> str | None:
    """Draw a sensor's week, forecast and counted; return the file's name. NOT PRIVATE."""
    sensor = settings.figure_sensor
    if not sensor:
        return None
    try:
        from .figure import draw_week  # noqa: PLC0415 - matplotlib is optional
    except ImportError:
        log.warning("No figure: matplotlib is not installed (pip install matplotlib)")
        return None
    for reply in _ask(grid, model, SENSOR_WEEK):
        try:
            week = SensorWeek.from_record(reply.content.array_records[records.ARRAYS])
            draw_week(
                settings.run_dir / FIGURE,
                week.hours,
                week.counts,
                week.expected,
                sensor=sensor,
                start=first_hour(settings),
            )
        except (ValueError, KeyError, TypeError):
            continue  # another node's sensor, or a node that shares nothing
        log.info("NOT PRIVATE: %s shows the week of %s", FIGURE, sensor)
        return FIGURE
    log.warning("No figure: no node shares hours of %r from %s", sensor, settings.figure_day)
    return None


@lru_cache(maxsize=1)
def reference() -> Reference:
    """Return what can be had without privacy on the packaged data set. NOT PRIVATE."""
    return Reference.of(sample_counts())


def _trained(grid: Grid, settings: Settings) -> PrivateResult:
    _refuse_if_spent(settings)
    start = ArrayRecord(new_model(seed=settings.init_seed).state_dict())
    return strategy_of(settings).start(grid, start, num_rounds=settings.num_rounds)


def _refuse_if_spent(settings: Settings) -> None:
    path, budget = _ledger_path(settings), _budget(settings)
    if not path.exists():
        return
    with Ledger.open(
        path,
        dataset=settings.dataset,
        delta=budget.delta,
        unit=budget.unit,
        relation=budget.relation,
        budget=budget,
    ) as ledger:
        spent = ledger.spent()
    if spent.epsilon > (1 - _WORTH_A_RUN) * budget.epsilon:
        raise RuntimeError(
            f"the budget is spent (epsilon {budget.epsilon:g} at delta {budget.delta:g}): {spent}. "
            f"The ledger {path.absolute()} counts all runs on these units"
        )


def _budget(settings: Settings) -> PrivacyBudget:
    return PrivacyBudget(settings.target_epsilon, settings.target_delta, unit=PrivacyUnit.USER)


def _ledger_path(settings: Settings) -> Path:
    return settings.run_dir / "ledger.jsonl"


def _ask(grid: Grid, model: ArrayRecord, query: str) -> list[Message]:
    messages = [
        Message(RecordDict({records.ARRAYS: model}), node, f"{MessageType.QUERY}.{query}")
        for node in grid.get_node_ids()
    ]
    return list(grid.send_and_receive(messages, timeout=_EVALUATION_SECONDS))
