"""Events, what they cost, and the ledger that keeps them.

>>> budget = PrivacyBudget(epsilon=8.0, delta=1e-5, unit="node")
>>> sampling = PoissonSampling(expected_cohort=100, population=1000)
>>> noise_multiplier = calibrate(budget, sampling, rounds=10)
>>> rounds = Composed(sampling.event(Gaussian(noise_multiplier)), 10)
>>> 7.999 < epsilon([rounds], delta=budget.delta, relation=budget.relation) <= 8.0
True
"""

from dpfl_flower.accounting.accountant import (
    UnsupportedEvent,
    delta,
    epsilon,
    total_variation_delta,
)
from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.calibration import affordable_rounds, calibrate, calibrate_event
from dpfl_flower.accounting.errors import (
    BudgetExhausted,
    LedgerError,
    LedgerLocked,
    LedgerTampered,
)
from dpfl_flower.accounting.events import (
    CappedPoissonSampled,
    Composed,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    event_from_json,
    events_from_json,
    events_to_json,
)
from dpfl_flower.accounting.flower_accountant import LedgerAccountant
from dpfl_flower.accounting.ledger import Ledger
from dpfl_flower.accounting.ledger_file import LedgerPosition
from dpfl_flower.accounting.plan import Plan
from dpfl_flower.accounting.sampling import (
    CappedPoissonSampling,
    CustomSampling,
    EveryoneSampling,
    FixedSizeSampling,
    PoissonSampling,
    Sampling,
)
from dpfl_flower.accounting.shuffling import (
    ShuffledStatement,
    shuffled_epsilon,
    shuffled_gaussian_epsilon,
)
from dpfl_flower.accounting.statement import PrivacyStatement
from dpfl_flower.accounting.units import PrivacyUnit, Relation, TrustModel

__all__ = [
    "BudgetExhausted",
    "CappedPoissonSampled",
    "CappedPoissonSampling",
    "Composed",
    "CustomSampling",
    "DistributedDiscreteGaussian",
    "DistributedSkellam",
    "Event",
    "EveryoneSampling",
    "FixedSizeSampled",
    "FixedSizeSampling",
    "Gaussian",
    "Laplace",
    "Ledger",
    "LedgerAccountant",
    "LedgerError",
    "LedgerLocked",
    "LedgerPosition",
    "LedgerTampered",
    "Plan",
    "PoissonSampled",
    "PoissonSampling",
    "PrivacyBudget",
    "PrivacyStatement",
    "PrivacyUnit",
    "Relation",
    "Sampling",
    "ShuffledStatement",
    "TrustModel",
    "UnsupportedEvent",
    "affordable_rounds",
    "calibrate",
    "calibrate_event",
    "delta",
    "epsilon",
    "event_from_json",
    "events_from_json",
    "events_to_json",
    "shuffled_epsilon",
    "shuffled_gaussian_epsilon",
    "total_variation_delta",
]
