"""Local trust: a node clips its whole update and adds all of the noise itself.

Nobody else is trusted with anything. The unit is the node and the relation replace-one: whoever
sees a node's answer may compare any two data sets it could have.

>>> noise = LocalNoise(clip_norm=1.0, rounds=10, delta=1e-5, target_epsilon=8.0)
>>> round(noise.resolve_noise_multiplier(), 2)
3.8
>>> noise.event(3.8)
Gaussian(noise_multiplier=3.8)
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable, Mod

from dpfl_flower import checks, records
from dpfl_flower.accounting import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    calibrate_event,
    epsilon,
)
from dpfl_flower.client.errors import NodeError, NodeErrorCode, answer
from dpfl_flower.client.node_ledger import NodeLedger, claim
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.clipping import Norm
from dpfl_flower.layout import Array as AnyArray
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.noise import NoiseDistribution, RoundedGaussian, RoundedLaplace
from dpfl_flower.quantize import BoundedSum, IntegerGrid, to_float
from dpfl_flower.rng import secure
from dpfl_flower.wire import answered_arrays, read_array

__all__ = ["LocalLaw", "LocalNoise", "local_noise_mod"]


class LocalLaw(StrEnum):
    """The law of local noise, and the norm that clips to it."""

    GAUSSIAN = "gaussian"
    """L2."""
    LAPLACE = "laplace"
    """L1: an L2 bound C on d entries is an L1 bound of sqrt(d) C only."""


@dataclass(frozen=True, kw_only=True)
class LocalNoise:
    """How a node's update is clipped and noised, and what all of its rounds may cost.

    Attributes
    ----------
    clip_norm : float
        L2 bound on the update, L1 for Laplace noise. Another data set moves the update by at most
        twice that: replace-one.
    rounds : int
        Rounds of a run; a node answers no more.
    delta : float
        At which the node's ledger reports epsilon.
    noise_multiplier : float or None
        Noise over clip norm in every round: standard deviation, or scale for Laplace noise.
    target_epsilon : float or None
        What all rounds together may cost, instead of a noise multiplier.
    law : LocalLaw
    max_inflation : float
        How much longer than the clip norm the enforced bound may be.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    clip_norm: float
    rounds: int
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    law: LocalLaw = LocalLaw.GAUSSIAN
    max_inflation: float = 1.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", LocalLaw(self.law))
        checks.positive(clip_norm=self.clip_norm)
        checks.positive_int(rounds=self.rounds)
        checks.probability(delta=self.delta)
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier!r} and target_epsilon="
                f"{self.target_epsilon!r}: exactly one of the two must be given"
            )
        for name in ("noise_multiplier", "target_epsilon"):
            if (value := getattr(self, name)) is not None:
                checks.positive(**{name: value})

    @property
    def budget(self) -> PrivacyBudget | None:
        """What all rounds together may cost; None where only the noise was given."""
        if self.target_epsilon is None:
            return None
        return PrivacyBudget(
            self.target_epsilon, self.delta, PrivacyUnit.NODE, Relation.REPLACE_ONE
        )

    def event(self, noise_multiplier: float) -> Event:
        """Return what one round is to the accountant, to be priced under replace-one."""
        law = Gaussian if self.law is LocalLaw.GAUSSIAN else Laplace
        return law(noise_multiplier)

    def resolve_noise_multiplier(self) -> float:
        """Return the noise multiplier given, or the least that keeps to the target."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return _calibrated(self)

    def grid(self, dimension: int) -> IntegerGrid:
        """Return the integers of an update of this length."""
        norm = Norm.L2 if self.law is LocalLaw.GAUSSIAN else Norm.L1
        return IntegerGrid.for_noise_multiplier(
            self.resolve_noise_multiplier(),
            dimension,
            norm=norm,
            max_inflation=self.max_inflation,
        )

    def distribution(self, grid: IntegerGrid) -> NoiseDistribution:
        """Return what is added to each of the integers."""
        law = RoundedGaussian if self.law is LocalLaw.GAUSSIAN else RoundedLaplace
        return law(grid.noise_units)


@lru_cache(maxsize=8)
def _calibrated(noise: LocalNoise) -> float:
    assert noise.budget is not None
    return calibrate_event(lambda z: Composed(noise.event(z), noise.rounds), noise.budget)


def local_noise_mod(noise: LocalNoise, *, dataset: str, path: str | None = None) -> Mod:
    """Return a mod that clips and noises all that a node's app answers to a train message.

    What leaves are the global arrays plus the noisy update, a ``num-examples`` of 1 for Flower's
    own strategies, and the node's claim; no count and no metric. The node's ledger is charged
    before; its `NodePolicy` holds. Arrays that are not floating stay as they came. Give it to
    ``@app.train(mods=[...])``; messages of other kinds pass.

    Whether a node answers at all, and that its app failed, are not protected.

    Parameters
    ----------
    noise : LocalNoise
    dataset : str
        The name of the data set, as in the node's ledger.
    path : str or None
        The ledger's file, where the node config has no ``ledger-path``.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        try:
            ledger = NodeLedger.from_context(context, dataset=dataset, path=path)
            policy = NodePolicy.from_node_config(context.node_config)
            return _answer(noise, ledger, policy, message, context, call_next)
        except Exception as error:
            return answer(error, reply_to=message)

    return mod


def _answer(
    noise: LocalNoise,
    ledger: NodeLedger,
    policy: NodePolicy,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> Message:
    try:
        sent = message.content.array_records[records.ARRAYS]
        reference = {name: np.array(read_array(array)) for name, array in sent.items()}
        layout = ArrayLayout.of(reference)
        grid = noise.grid(layout.dimension)
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
    bounded = BoundedSum(grid, clip_norm=noise.clip_norm)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    try:
        arrays = answered_arrays(reply.content)
        layout.check(arrays)
        integers = bounded.contribution(layout.released(arrays), layout.released(reference))
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
    law = noise.distribution(grid)
    claimed = _charge(noise, ledger, policy, variation=law.total_variation * grid.width)
    noisy = integers + law.sample(grid.width, secure())
    update = to_float(noisy, grid.unit_size(noise.clip_norm), 1.0)
    released: dict[str, AnyArray] = dict(
        layout.restore(layout.flatten(reference) + update, reference)
    )
    return Message(
        RecordDict(
            {
                records.ARRAYS: ArrayRecord(
                    {name: Array(np.asarray(array)) for name, array in released.items()}
                ),
                records.METRICS: MetricRecord({records.NUM_EXAMPLES: 1}),
                records.PRIVACY: claimed,
            }
        ),
        reply_to=message,
    )


def _charge(
    noise: LocalNoise, node: NodeLedger, policy: NodePolicy, *, variation: float
) -> ConfigRecord:
    multiplier = noise.resolve_noise_multiplier()
    event = noise.event(multiplier)
    with node.open(
        delta=noise.delta,
        unit=PrivacyUnit.NODE,
        relation=Relation.REPLACE_ONE,
        budget=noise.budget,
    ) as ledger:
        spent_after = 0.0
        if policy.max_epsilon is not None:
            spent_after = epsilon(
                [*ledger.events(), event],
                delta=ledger.delta,
                relation=ledger.relation,
                total_variation=ledger.total_variation + variation,
            )
        policy.check(
            noise_multiplier=multiplier,
            epsilon=spent_after,
            delta=ledger.delta,
            durable=ledger.durable and node.chosen_by_node,
        )
        ledger.plan(node.run, event, noise.rounds, total_variation=variation)
        ledger.charge(node.run)
        return claim(ledger)
