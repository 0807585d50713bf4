"""Many users inside one node: each a privacy unit, all answered for by one bounded sum."""

from typing import TYPE_CHECKING

from dpfl_flower.client.users.app import CohortFn, user_cohort_app
from dpfl_flower.client.users.request import CohortRequest, UserId
from dpfl_flower.lazily import attributes_from

if TYPE_CHECKING:
    from dpfl_flower.client.users.closed_form import LocalUpdate
    from dpfl_flower.client.users.cohort import UserCohort
    from dpfl_flower.client.users.engine import Chunk, Engine
    from dpfl_flower.client.users.registry import LazyUsers
    from dpfl_flower.client.users.training import LocalOptimizer, LocalTraining
else:  # all of these import torch
    __getattr__ = attributes_from(
        __name__,
        {
            "Chunk": "engine",
            "Engine": "engine",
            "LazyUsers": "registry",
            "LocalOptimizer": "training",
            "LocalTraining": "training",
            "LocalUpdate": "closed_form",
            "UserCohort": "cohort",
        },
    )

__all__ = [
    "Chunk",
    "CohortFn",
    "CohortRequest",
    "Engine",
    "LazyUsers",
    "LocalOptimizer",
    "LocalTraining",
    "LocalUpdate",
    "UserCohort",
    "UserId",
    "user_cohort_app",
]
