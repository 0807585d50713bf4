"""What a user may hand to a private strategy: checked against each other, then made into parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from flwr.app import ArrayRecord

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyUnit, Sampling
from dpfl_flower.clipping import ClippingPolicy
from dpfl_flower.federated_dropout import FederatedDropout
from dpfl_flower.quantize import Rounding
from dpfl_flower.rng import RandomSource
from dpfl_flower.secagg import SecureAggregation
from dpfl_strategies.gathering import Gathering, NodesAreUnits, UnitsInsideNodes
from dpfl_strategies.messages import Arrays, from_record
from dpfl_strategies.noised_metrics import NoisedMetrics
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.secure_gathering import SecureGathering
from dpfl_strategies.server_optimizers import ServerOptimizer
from dpfl_strategies.weighting import UniformWeighting, Weighting

__all__ = ["check_arguments", "gathering_for", "model_of", "rounding_for"]

# Above this cohort, nearest rounding could lose more than 1 % of the noise's scale in each
# coordinate to a common bias (cohort / 2 grid units against 2**14); a public dither has none.
_DITHER_ABOVE: Final = 256


def check_arguments(
    *,
    clipping: ClippingPolicy,
    server_optimizer: ServerOptimizer | None,
    weighting: Weighting | None,
    ledger: str | Path | None,
    dataset: str,
    checkpoint_dir: str | Path | None,
    give_up_after: int | None,
    noise_seed: int | None,
    secure_aggregation: SecureAggregation | None,
) -> None:
    """Raise ValueError, naming it, for an argument of another type, out of range, or misplaced."""
    none = type(None)
    if not isinstance(clipping, ClippingPolicy):
        raise ValueError(
            f"clipping={clipping!r} must be FixedClipping(...), AdaptiveClipping(...) or a "
            "ClippingPolicy of your own"
        )
    checks.instance(ServerOptimizer, none, server_optimizer=server_optimizer)
    checks.instance(Weighting, none, weighting=weighting)
    if not isinstance(secure_aggregation, SecureAggregation | None):
        raise ValueError(
            f"secure_aggregation={secure_aggregation!r} must be SecAggPlus(...), CKKS(...) or None"
        )
    checks.instance(str, Path, none, ledger=ledger, checkpoint_dir=checkpoint_dir)
    checks.name(dataset=dataset)
    if give_up_after is not None:
        checks.positive_int(give_up_after=give_up_after)
    if noise_seed is not None:
        checks.non_negative_int(noise_seed=noise_seed)
    if noise_seed is not None and (ledger is not None or checkpoint_dir is not None):
        raise ValueError(
            f"noise_seed={noise_seed!r} must be None with a ledger or a checkpoint_dir: seeded "
            "noise protects nobody, so nothing it releases may be recorded as private"
        )


def rounding_for(rounding: Rounding | str | None, sampling: Sampling) -> Rounding:
    """Return the rounding that was asked for, else the one that fits the cohort."""
    large = sampling.expected_cohort > _DITHER_ABOVE
    return checks.choice(
        Rounding, rounding=rounding or (Rounding.DITHERED if large else Rounding.NEAREST)
    )


def gathering_for(
    request: PrivacyRequest,
    *,
    rng: RandomSource,
    weigh: Callable[[float], float],
    weighting: Weighting,
    weighs_by_weighting: bool,
    num_nodes: int | None,
    federated_dropout: FederatedDropout | None,
    secure_aggregation: SecureAggregation | None,
    noised_metrics: NoisedMetrics | None,
) -> Gathering:
    """Return how a round's sum is gathered from nodes that are units, or that hold them.

    Raises
    ------
    ValueError
        Where unit, nodes, weights, dropout, metrics and secure aggregation do not go together.
    """
    gathering: Gathering
    if num_nodes is None:
        if request.unit is not PrivacyUnit.NODE:
            raise ValueError(
                f"unit={str(request.unit)!r} must be 'node' without num_nodes: a record more "
                "or less in a node changes its whole update, which moves the sum by up to two "
                "clip norms. Give num_nodes where nodes bound each of their units themselves; "
                "or unit='node' and relation='replace-one', which covers whatever changes "
                "inside a node"
            )
        gathering = NodesAreUnits(
            request.sampling, rng=rng, weigh=weigh, federated_dropout=federated_dropout
        )
    else:
        if federated_dropout is not None:
            raise ValueError(
                f"federated_dropout={federated_dropout!r} must be None with num_nodes="
                f"{num_nodes}: the units of a node train one model"
            )
        if noised_metrics is not None:
            raise ValueError(
                f"metrics={noised_metrics!r} must be 'none' or 'not_private' with num_nodes="
                f"{num_nodes}: a node answers the sum of its units' updates, and none of them "
                "reports metrics"
            )
        gathering = UnitsInsideNodes(request.sampling, num_nodes=num_nodes, unit=request.unit)
        if not isinstance(weighting, UniformWeighting):
            raise ValueError(
                f"weighting={weighting!r} must be uniform with num_nodes={num_nodes}: "
                "how many records a unit has stays in its node"
            )
    if secure_aggregation is None:
        return gathering
    if federated_dropout is not None:
        raise ValueError(
            f"federated_dropout={federated_dropout!r} must be None with "
            "secure_aggregation: masked vectors are all of one length"
        )
    return SecureGathering(
        gathering,
        secure_aggregation,
        request=request,
        weighting=weighting if weighs_by_weighting else None,
    )


def model_of(initial_arrays: ArrayRecord, federated_dropout: FederatedDropout | None) -> Arrays:
    """Return the arrays to begin with; ValueError where a number in them is not finite."""
    model = from_record(initial_arrays)
    if federated_dropout is not None:
        federated_dropout.check(model)
    for name, array in model.items():
        if not np.isfinite(array).all():
            raise ValueError(f"initial_arrays[{name!r}] must be finite numbers")
    return model
