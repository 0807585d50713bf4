"""What runs at the server: it adds noise to the nodes' sums, steps, and reports what was spent."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Final

from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling, Ledger, PrivacyBudget, PrivacyUnit
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.final_model import save_model
from dpfl_flower.quantize import Rounding
from dpfl_strategies import DPFedAvg, FedAvgM, PrivateResult

from .evaluation import HELD_OUT, SHOW_FILMS, HeldOutAnswer
from .reference import Reference
from .report import Report
from .shop import sample
from .task import Settings, SquaredErrors, new_model

log = logging.getLogger("flwr.recommender")

app = ServerApp()

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
    errors = sum((answer.errors for answer in answers), SquaredErrors())
    packaged = len(answers) == settings.num_nodes and all(answer.packaged for answer in answers)
    spent = result.privacy
    report = Report(
        run_id=run_id,
        rounds=result.rounds,
        stopped=str(result.stopped),
        split_seed=settings.split_seed,
        dataset=spent.dataset,
        unit=str(spent.unit),
        relation=str(spent.relation),
        epsilon=spent.epsilon,
        delta=spent.delta,
        durable=spent.durable,
        nodes=len(answers),
        expected_nodes=settings.num_nodes,
        not_private_rmse=errors.rmse,
        not_private_held_out=errors.count,
        not_private_reference=reference(settings.split_seed) if packaged else None,
    )
    if settings.sample_user:
        _ask(grid, model, SHOW_FILMS)
    log.info("Result: %s", report.save(settings.run_dir).absolute())
    return report


def strategy_of(settings: Settings) -> DPFedAvg:
    """Return the strategy: DP-FedAvg over users, who live many to a node."""
    return DPFedAvg(
        budget=_budget(settings),
        sampling=EveryoneSampling(settings.num_users),
        num_nodes=settings.num_nodes,
        clipping=FixedClipping(settings.clip_norm),
        server_optimizer=FedAvgM(
            lr=settings.server_learning_rate, momentum=settings.server_momentum
        ),
        rounding=Rounding.DITHERED,
        ledger=_ledger_path(settings),
        dataset=settings.dataset,
    )


def evaluate(grid: Grid, model: ArrayRecord) -> list[HeldOutAnswer]:
    """Ask each node once for its errors on held-out ratings. NOT PRIVATE."""
    answers = []
    for reply in _ask(grid, model, HELD_OUT):
        try:
            answers.append(HeldOutAnswer.from_metrics(reply.content[records.METRICS]))
        except (ValueError, KeyError, TypeError):
            log.warning("Node %d shares no evaluation", reply.metadata.src_node_id)
    return answers


@lru_cache(maxsize=16)
def reference(split_seed: int) -> Reference:
    """Return what can be had without privacy on the packaged data set. NOT PRIVATE."""
    shop = sample()
    return Reference.of(shop.splits(seed=split_seed), shop.catalogue)


def _trained(grid: Grid, settings: Settings) -> PrivateResult:
    _refuse_if_spent(settings)
    start = ArrayRecord({n: Array(array) for n, array in new_model(sample().catalogue).items()})
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
            f"The ledger {path.absolute()} counts all runs on these users"
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
