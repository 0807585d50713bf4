"""Differentially private federated learning on Flower.

The parts that are not Flower strategies: bounded contributions, integer sums, noise, accounting
and clients. The strategies themselves are in ``dpfl_strategies``.
"""

from dpfl_flower.accounting import (
    BudgetExhausted,
    CappedPoissonSampling,
    CustomSampling,
    EveryoneSampling,
    FixedSizeSampling,
    Ledger,
    LedgerError,
    PoissonSampling,
    PrivacyBudget,
    PrivacyStatement,
    PrivacyUnit,
    Relation,
    Sampling,
)
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.federated_dropout import FederatedDropout

__all__ = [
    "AdaptiveClipping",
    "BudgetExhausted",
    "CappedPoissonSampling",
    "CustomSampling",
    "EveryoneSampling",
    "FederatedDropout",
    "FixedClipping",
    "FixedSizeSampling",
    "Ledger",
    "LedgerError",
    "PoissonSampling",
    "PrivacyBudget",
    "PrivacyStatement",
    "PrivacyUnit",
    "Relation",
    "Sampling",
]
