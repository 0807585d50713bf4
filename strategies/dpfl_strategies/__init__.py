"""Flower strategies whose privacy can be believed.

``DPFedAvg`` replaces Flower's ``FedAvg`` in front of an unchanged ClientApp; ``SampleLevelFedAvg``
averages nodes that train with DP-SGD; ``DistributedDPFedAvg`` has the nodes add the noise and
trusts no server; ``LocalDPFedAvg`` has each node add all of its own and trusts nobody;
``PrivateStrategy`` is what to subclass for more.
"""

from dpfl_strategies.checkpoint import CheckpointError
from dpfl_strategies.client_metrics import ClientMetrics
from dpfl_strategies.distributed_fedavg import DistributedDPFedAvg
from dpfl_strategies.dp_fedavg import DPFedAvg
from dpfl_strategies.local_fedavg import LocalDPFedAvg
from dpfl_strategies.node_privacy import NodeClaim, NodePrivacyReport
from dpfl_strategies.noised_metrics import NoisedMetrics
from dpfl_strategies.private_strategy import PrivateStrategy
from dpfl_strategies.registry import PopulationNotReached
from dpfl_strategies.result import PrivateResult, Stopped
from dpfl_strategies.round_loop import AllClientsFailed
from dpfl_strategies.sample_level_fedavg import SampleLevelFedAvg
from dpfl_strategies.server_optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from dpfl_strategies.weighting import NumExamplesWeighting, UniformWeighting, Weighting

__all__ = [
    "AllClientsFailed",
    "CheckpointError",
    "ClientMetrics",
    "DPFedAvg",
    "DistributedDPFedAvg",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "LocalDPFedAvg",
    "NodeClaim",
    "NodePrivacyReport",
    "NoisedMetrics",
    "NumExamplesWeighting",
    "PopulationNotReached",
    "PrivateResult",
    "PrivateStrategy",
    "SampleLevelFedAvg",
    "ServerOptimizer",
    "Stopped",
    "UniformWeighting",
    "Weighting",
]
