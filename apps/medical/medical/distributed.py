"""What runs in a hospital under distributed trust: its patients' clipped gradients, noised, masked.

The coordinator sees one sum over all hospitals, with noise to which each hospital added its share.
"""

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import PrivacyBudget
from dpfl_flower.client import NodeLedger, noise_share_mod, secure_aggregation_mod
from dpfl_flower.client.node_ledger import claim
from dpfl_flower.client.users import UserCohort, user_cohort_app

from .features import design
from .hospital import Hospital
from .split import Split
from .task import Row, Settings, gradient_step


def patients_of(context: Context) -> UserCohort:
    """Return the training patients of this node's hospital, each a privacy unit."""
    settings = Settings.parse(context.run_config)
    hospital = Hospital.of(context, run_dir=settings.run_dir)
    patients = Split.of(hospital.patients, seed=settings.split_seed).training
    x, y = design(patients)
    rows = zip(x.astype(np.float64), y.astype(np.float64), strict=True)
    users: dict[str, Row] = {str(p.id): row for p, row in zip(patients, rows, strict=True)}
    return UserCohort(users, local_update=gradient_step)


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
    return user_cohort_app(patients_of, mods=[secure_aggregation_mod, share])


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
