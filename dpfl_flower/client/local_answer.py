"""The mod by which a node answers with all of its own noise, charged before it leaves.

>>> policy = LocalPolicy.from_node_config({"max-rounds": 5})
>>> policy.check(LocalNoise(clip_norm=1.0, rounds=9, delta=1e-5, noise_multiplier=1.0))
Traceback (most recent call last):
    ...
dpfl_flower.client.errors.NodeError: rounds=9 must be <= 5, this node's policy
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.accounting import Ledger, PrivacyBudget, PrivacyUnit
from dpfl_flower.client.awaiting import awaiting_noise
from dpfl_flower.client.errors import NodeError, NodeErrorCode, answer, app_failed
from dpfl_flower.client.local_noise import LocalNoise
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.node_ledger import NodeLedger, claim
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.layout import Array as AnyArray
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.noise import NoiseDistribution
from dpfl_flower.quantize import BoundedSum, IntegerGrid, to_float
from dpfl_flower.rng import secure
from dpfl_flower.secagg.encoding import Integers
from dpfl_flower.wire import answered_arrays, array_record, config_record, read_array, write_array

__all__ = ["LocalPolicy", "local_noise_mod"]


@dataclass(frozen=True, kw_only=True)
class LocalPolicy:
    """What a node insists on before it answers with noise of its own, whoever plans it.

    Parameters
    ----------
    node : NodePolicy
    max_rounds : int or None
        The most rounds of one run; None: as many as the ledger allows.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    node: NodePolicy = field(default_factory=NodePolicy)
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        if self.max_rounds is not None:
            checks.positive_int(max_rounds=self.max_rounds)

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, object]) -> Self:
        """Read ``max-rounds``, and what `NodePolicy` reads."""
        return cls(
            node=NodePolicy.from_node_config(node_config),
            max_rounds=node_config.get(records.MAX_ROUNDS),  # type: ignore[arg-type]
        )

    def check(self, noise: LocalNoise) -> None:
        """Raise NodeError, POLICY_REFUSED, for less noise or more rounds than this node takes.

        Its ``max_epsilon`` is checked with the ledger, when the round is charged.
        """
        least = self.node.min_noise_multiplier
        NodePolicy(min_noise_multiplier=least).check(
            noise_multiplier=noise.resolve_noise_multiplier(), epsilon=0.0
        )
        if self.max_rounds is not None and not noise.rounds <= self.max_rounds:
            raise NodeError(
                NodeErrorCode.POLICY_REFUSED,
                f"rounds={noise.rounds!r} must be <= {self.max_rounds!r}, this node's policy",
            )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What this round asks of the node; ``request`` is None where only the node's own word is."""

    noise: LocalNoise
    budget: PrivacyBudget | None
    request: LocalRequest | None


def local_noise_mod(
    noise: LocalNoise | None = None,
    *,
    dataset: str,
    unit: PrivacyUnit | str | None = None,
    path: str | None = None,
) -> Mod:
    """Return a mod that bounds and noises all that a node's app answers to a train message.

    With ``noise`` the node's own configuration stands; a train message may hold a `LocalRequest`,
    which is refused where it asks for anything else. Without, the node obeys the request that
    `LocalDPFedAvg` sends, as far as its policy allows, and answers no message that has none.

    The app behind the mod is any that returns weights, where the node is the unit: their difference
    from the global model is bounded here. Otherwise it is a `user_cohort_app`, which is asked for
    its units' integer sum.

    What leaves is the noisy integer sum, or, where there is no request, the global arrays plus
    the noisy update and a ``num-examples`` of 1, for Flower's own strategies; and the node's claim.
    No count and no metric. The node's ledger is charged before; its `LocalPolicy` holds. Arrays
    that are not floating stay as they came. Give it to ``@app.train(mods=[...])``; messages of
    other kinds pass.

    Whether a node answers at all, and that its app failed, are not protected.

    Parameters
    ----------
    noise : LocalNoise or None
    dataset : str
        The name of the data set, as in the node's ledger.
    unit : PrivacyUnit or None
        What one unit of the app is, which only the app knows; a request for another is refused. A
        server that says "example" where each unit is a user with many records would have the
        ledger claim too little: an example more moves its user's update by up to two clip norms.
        None: that of ``noise``, else the server's word.
    path : str or None
        The ledger's file, where the node config has no ``ledger-path``.
    """
    whose = None if unit is None else checks.choice(PrivacyUnit, unit=unit)
    if noise is not None and whose not in {None, noise.unit}:
        raise ValueError(f"unit={str(whose)!r} must be noise.unit={str(noise.unit)!r}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        try:
            ledger = NodeLedger.from_context(context, dataset=dataset, path=path)
            policy = LocalPolicy.from_node_config(context.node_config)
            plan = _planned(noise, message.content)
            policy.check(plan.noise)
            if whose not in {None, plan.noise.unit}:
                raise NodeError(
                    NodeErrorCode.POLICY_REFUSED,
                    f"unit={str(plan.noise.unit)!r} must be {str(whose)!r}, what this app adds up",
                )
            return _answer(plan, ledger, policy.node, message, context, call_next)
        except (Exception, SystemExit) as error:  # sys.exit carries text of the app's too
            return answer(error, reply_to=message)

    return mod


def _planned(noise: LocalNoise | None, content: RecordDict) -> _Plan:
    found = config_record(content, records.LOCAL)
    if found is None:
        if noise is None or records.SECAGG in content:
            raise NodeError(
                NodeErrorCode.POLICY_REFUSED,
                "a train message without a plan for local noise: the strategy is no "
                "LocalDPFedAvg, or secure_aggregation_mod must stand before this mod: "
                "mods=[secure_aggregation_mod, local_noise_mod(...)]",
            )
        if noise.unit is not PrivacyUnit.NODE:
            raise NodeError(
                NodeErrorCode.MALFORMED_REQUEST,
                f"unit={str(noise.unit)!r} needs a LocalRequest: a sum is no model",
            )
        return _Plan(noise=noise, budget=noise.budget, request=None)
    try:
        request = LocalRequest.from_config(found)
    except (ValueError, TypeError, OverflowError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
    if noise is None:
        return _Plan(noise=request.noise, budget=request.budget, request=request)
    if request.noise != noise.resolved():
        raise NodeError(
            NodeErrorCode.POLICY_REFUSED,
            f"noise={request.noise!r} must be {noise.resolved()!r}, this node's own",
        )
    return _Plan(noise=noise, budget=noise.budget, request=request)


def _answer(
    plan: _Plan,
    ledger: NodeLedger,
    policy: NodePolicy,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> Message:
    noise, request = plan.noise, plan.request
    try:
        sent = array_record(message.content, records.ARRAYS)
        reference = {name: np.array(read_array(array)) for name, array in sent.items()}
        layout = ArrayLayout.of(reference)
        if request is not None and request.dimension != layout.dimension:
            raise ValueError(
                f"dimension={request.dimension} must be the model's, {layout.dimension}"
            )
        grid = noise.grid(layout.dimension)
        bounded = BoundedSum(grid, clip_norm=noise.clip_norm)
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
    law = noise.distribution(grid)
    with _planned_ledger(plan, ledger, policy, law=law, width=grid.width) as opened:
        # Refused before the app is asked: how long it takes is seen, and nobody is charged for it.
        if opened.affordable(ledger.run, 1) < 1:
            opened.charge(ledger.run)  # raises, and says why
    # The records may be those of other nodes' messages too: they are replaced, never changed.
    message.content = RecordDict({k: r for k, r in message.content.items() if k != records.LOCAL})
    if noise.unit is PrivacyUnit.NODE:
        reply = call_next(message, context)
    else:
        assert request is not None
        with awaiting_noise(request):
            reply = call_next(message, context)
    if reply.has_error():
        raise app_failed(reply.error.code)
    try:
        if noise.unit is PrivacyUnit.NODE:
            arrays = answered_arrays(reply.content)
            layout.check(arrays)
            sum_: Integers = bounded.contribution(
                layout.released(arrays), layout.released(reference)
            )
        else:
            sum_ = _sum_of(reply.content, grid)
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
    claimed = _charge(plan, ledger, policy, law=law, width=grid.width)
    noisy = sum_ + law.sample(grid.width, secure())
    content = RecordDict({records.PRIVACY: claimed})
    if request is not None:
        content[records.INTEGER_SUM] = ArrayRecord({records.SUM: write_array(noisy)})
        return Message(content, reply_to=message)
    update = to_float(noisy, grid.unit_size(noise.clip_norm), 1.0)
    released: dict[str, AnyArray] = dict(
        layout.restore(layout.flatten(reference) + update, reference)
    )
    content[records.ARRAYS] = ArrayRecord(
        {name: write_array(np.asarray(array)) for name, array in released.items()}
    )
    content[records.METRICS] = MetricRecord({records.NUM_EXAMPLES: 1})
    return Message(content, reply_to=message)


def _sum_of(content: RecordDict, grid: IntegerGrid) -> NDArray[np.int64]:
    """Return the sum that the app made of its units, each held to the grid's bound by it."""
    found = read_array(array_record(content, records.INTEGER_SUM)[records.SUM])
    total = found.astype(np.int64, casting="safe")
    if total.shape != (grid.width,):
        raise ValueError(f"sum of shape {total.shape} must be of shape ({grid.width},)")
    return total


@contextmanager
def _planned_ledger(
    plan: _Plan, node: NodeLedger, policy: NodePolicy, *, law: NoiseDistribution, width: int
) -> Iterator[Ledger]:
    """Open the node's ledger with this run's plan in it, if the policy allows one more round."""
    noise = plan.noise
    multiplier = noise.resolve_noise_multiplier()
    variation = law.total_variation * width
    event = noise.event(multiplier)
    with node.open(
        delta=noise.delta, unit=noise.unit, relation=noise.relation, budget=plan.budget
    ) as ledger:
        policy.check_release(
            ledger,
            event,
            noise_multiplier=multiplier,
            total_variation=variation,
            chosen_by_node=node.chosen_by_node,
        )
        ledger.plan(node.run, event, noise.rounds, total_variation=variation)
        yield ledger


def _charge(
    plan: _Plan, node: NodeLedger, policy: NodePolicy, *, law: NoiseDistribution, width: int
) -> ConfigRecord:
    request = plan.request
    with _planned_ledger(plan, node, policy, law=law, width=width) as ledger:
        ledger.charge(node.run, note=None if request is None else {"round": request.server_round})
        return claim(ledger)
