"""What runs in a hospital under distributed trust: its patients' clipped gradients, noised, masked.

The coordinator sees one sum over all hospitals, with noise to which each hospital added its share.
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.accounting import PrivacyBudget
from dpfl_flower.client import NodeLedger, noise_share_mod, secure_aggregation_mod, users
from dpfl_flower.client.node_ledger import claim

from .features import design
from .hospital import Hospital
from .settings import Settings
from .split import Split

Row = tuple[NDArray[np.float64], np.float64]
"""One patient's features, shape ``(15,)``, and label."""


def gradient_step(
    arrays: Mapping[str, NDArray[np.floating]], row: Row
) -> dict[str, NDArray[np.float64]]:
    """Return the model less the gradient of one patient's loss, in closed form."""
    features, label = row
    weight, bias = (np.asarray(arrays[name], np.float64) for name in ("weight", "bias"))
    probability = (1 + np.tanh((weight[0] @ features + bias[0]) / 2)) / 2
    slope = probability - label
    return {"weight": weight - slope * features, "bias": bias - slope}


def patients_of(context: Context) -> "users.UserCohort":
    """Return the training patients of this node's hospital, each a privacy unit."""
    settings = Settings.parse(context.run_config)
    hospital = Hospital.of(context, run_dir=settings.run_dir)
    patients = Split.of(hospital.patients, seed=settings.split_seed).training
    x, y = design(patients)
    rows = zip(x.astype(np.float64), y.astype(np.float64), strict=True)
    by_id: dict[str, Row] = {str(p.id): row for p, row in zip(patients, rows, strict=True)}
    return users.UserCohort(by_id, local_update=gradient_step)


def app_for(context: Context) -> ClientApp:
    """Return the app that answers train messages on this node."""
    settings = Settings.parse(context.run_config)
    hospital = Hospital.of(context, run_dir=settings.run_dir)
    share = noise_share_mod(
        dataset=hospital.dataset,
        delta=settings.target_delta,
        budget=_budget(settings),
        path=None if hospital.ledger_path is None else str(hospital.ledger_path),
    )
    return users.user_cohort_app(patients_of, mods=[secure_aggregation_mod, share])


def with_claim(reply: Message, context: Context) -> Message:
    """Add to ``reply`` what this hospital's ledger says its patients have spent."""
    settings = Settings.parse(context.run_config)
    hospital = Hospital.of(context, run_dir=settings.run_dir)
    ledger = NodeLedger.from_context(context, dataset=hospital.dataset, path=hospital.ledger_path)
    if not reply.has_error():
        with ledger.open(delta=settings.target_delta, budget=_budget(settings)) as opened:
            reply.content[records.PRIVACY] = claim(opened)
    return reply


def _budget(settings: Settings) -> PrivacyBudget:
    return PrivacyBudget(settings.target_epsilon, settings.target_delta, "example")
