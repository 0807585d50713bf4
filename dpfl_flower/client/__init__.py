"""Clients: a NumPyClient for the Message API, and one that trains with DP-SGD.

What trains with torch is imported when it is first named: torch takes longer to import than all
else, and a SuperNode starts a process for every message.
"""

from typing import TYPE_CHECKING

from dpfl_flower.client.ckks import ckks_mod
from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.dp_sgd_config import DPSGDConfig
from dpfl_flower.client.errors import (
    NODE_LOGGER,
    ModelRefused,
    NodeError,
    NodeErrorCode,
    guard_mod,
    guarded,
)
from dpfl_flower.client.local_answer import LocalPolicy, local_noise_mod
from dpfl_flower.client.local_noise import LocalLaw, LocalNoise
from dpfl_flower.client.node_ledger import NodeLedger
from dpfl_flower.client.noise_share import NoiseShare, SharePolicy, noise_share_mod
from dpfl_flower.client.noise_source import NoiseSource
from dpfl_flower.client.numpy_client import ClaimsPrivacy, numpy_client_app
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.secure_aggregation import secure_aggregation_mod
from dpfl_flower.lazily import attributes_from

if TYPE_CHECKING:
    from dpfl_flower.client.dp_sgd import DPSGDClient, OptimizerFactory
    from dpfl_flower.client.per_example import GradientEngine
    from dpfl_flower.client.stacked_dp_sgd import StackedDPSGD, StackedOutcome
else:
    __getattr__ = attributes_from(
        __name__,
        {
            "DPSGDClient": "dp_sgd",
            "GradientEngine": "per_example",
            "OptimizerFactory": "dp_sgd",
            "StackedDPSGD": "stacked_dp_sgd",
            "StackedOutcome": "stacked_dp_sgd",
        },
    )

__all__ = [
    "NODE_LOGGER",
    "ClaimsPrivacy",
    "ClipStyle",
    "DPSGDClient",
    "DPSGDConfig",
    "GradientEngine",
    "LocalLaw",
    "LocalNoise",
    "LocalPolicy",
    "ModelRefused",
    "NodeError",
    "NodeErrorCode",
    "NodeLedger",
    "NodePolicy",
    "NoiseShare",
    "NoiseSource",
    "OptimizerFactory",
    "SharePolicy",
    "StackedDPSGD",
    "StackedOutcome",
    "ckks_mod",
    "guard_mod",
    "guarded",
    "local_noise_mod",
    "noise_share_mod",
    "numpy_client_app",
    "secure_aggregation_mod",
]
