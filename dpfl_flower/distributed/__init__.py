"""Distributed noise: every node adds a share, and only the noisy sum is ever seen.

>>> from dpfl_flower.accounting import PrivacyBudget
>>> plan = design(
...     PrivacyBudget(1.0, 1e-4, "example"), rounds=30, dimension=16, clip_norm=0.5,
...     num_nodes=4, min_survivors=3, max_units=736,
... )
>>> plan.honest_shares, plan.grid.bits, round(plan.noise_multiplier, 1)
(3, 32, 19.2)
"""

from dpfl_flower.distributed.accuracy import Accuracy, accuracy, accuracy_lost, wrap_probability
from dpfl_flower.distributed.design import design
from dpfl_flower.distributed.plan import DistributedPlan, ShareNoise

__all__ = [
    "Accuracy",
    "DistributedPlan",
    "ShareNoise",
    "accuracy",
    "accuracy_lost",
    "design",
    "wrap_probability",
]
