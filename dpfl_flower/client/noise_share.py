"""A node's share of distributed noise: what it insists on, charged before it leaves.

>>> from dpfl_flower.accounting import PrivacyBudget
>>> from dpfl_flower.distributed import design
>>> plan = design(PrivacyBudget(1.0, 1e-4, "example"), rounds=30, dimension=16, clip_norm=0.5,
...     num_nodes=4, min_survivors=3, max_units=736)
>>> request = DistributedRequest(plan=plan, server_round=1, num_rounds=30, rotation_seed=b"x",
...     sampling_rate=1.0)
>>> share = NoiseShare(NodeLedger("heart"), delta=1e-4, policy=SharePolicy())
>>> residues = share.added(request, request.open_sum().total)
>>> residues.shape, bool(residues.min() >= 0), bool(residues.max() < 2**32)
((16,), True, True)
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self, final

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.accounting import Event, Gaussian, Ledger, PrivacyBudget, PrivacyUnit
from dpfl_flower.client.awaiting import awaiting_noise
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.errors import NodeError, NodeErrorCode, answer, app_failed
from dpfl_flower.client.masked_answer import masks_follow
from dpfl_flower.client.node_ledger import NodeLedger
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import reduced
from dpfl_flower.rng import RandomSource, secure
from dpfl_flower.wire import array_record, config_record, read_array

__all__ = ["NoiseShare", "SharePolicy", "noise_share_mod"]

_DEFAULT_MIN_COHORT = 3


@dataclass(frozen=True, kw_only=True)
class SharePolicy:
    """What a node insists on before it adds a share, whatever the server plans.

    Parameters
    ----------
    node : NodePolicy
        Its ``min_noise_multiplier`` is for the noise that is certain, all honest shares together;
        its ``max_epsilon`` is priced as if no more than those were in the sum.
    min_share_multiplier : float
        The least that the node's own share must be, over the bound on a unit: what is left if
        every other node works with the server.
    enforced_survivors : int or None
        With fewer vectors in the sum than this, the node itself does not let it be unmasked. A plan
        that counts on more survivors is refused: their number would be the server's word. None: as
        many as the plan counts on and secure aggregation on this node enforces, which without a
        roster is as many neighbours as the server makes up.
    colluders : int
        How many survivors the node reckons may work with the server (``secagg-colluders``). A plan
        that reckons with fewer is refused.
    max_rounds : int or None
        The most rounds of one run; None: as many as the ledger allows.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    node: NodePolicy = field(default_factory=NodePolicy)
    min_share_multiplier: float = 0.0
    enforced_survivors: int | None = _DEFAULT_MIN_COHORT
    colluders: int = 0
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        checks.non_negative(min_share_multiplier=self.min_share_multiplier)
        if self.enforced_survivors is not None:
            checks.positive_int(enforced_survivors=self.enforced_survivors)
        checks.non_negative_int(colluders=self.colluders)
        if self.max_rounds is not None:
            checks.positive_int(max_rounds=self.max_rounds)

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, object]) -> Self:
        """Read ``min-share-multiplier``, ``max-rounds``, and what `NodePolicy` reads.

        And ``secagg-min-cohort`` (3) and ``secagg-colluders`` (0), which secure aggregation on
        this node obeys. A node with a roster counts on as many survivors as its roster makes
        certain, and one whose config insists on nothing takes the plan's word.
        """
        node = NodePolicy.from_node_config(node_config)
        insists = node != NodePolicy() or records.SECAGG_MIN_COHORT in node_config
        takes_word = records.SECAGG_ROSTER in node_config or not insists
        max_rounds = node_config.get(records.MAX_ROUNDS)
        return cls(
            node=node,
            min_share_multiplier=node_config.get(  # type: ignore[arg-type]
                records.MIN_SHARE_MULTIPLIER, 0.0
            ),
            enforced_survivors=None
            if takes_word
            else node_config.get(  # type: ignore[arg-type]
                records.SECAGG_MIN_COHORT, _DEFAULT_MIN_COHORT
            ),
            colluders=node_config.get(records.SECAGG_COLLUDERS, 0),  # type: ignore[arg-type]
            max_rounds=max_rounds,  # type: ignore[arg-type]
        )

    def check(self, request: DistributedRequest) -> None:
        """Raise NodeError, POLICY_REFUSED, unless the plan is one that this node takes part in.

        ``node`` itself is checked with the ledger, when the round is charged.
        """
        plan = request.plan
        _at_least(self.min_share_multiplier, share_multiplier=plan.share_multiplier)
        _at_least(self.colluders, colluders=plan.colluders)
        if self.enforced_survivors is not None:
            _at_most(self.enforced_survivors, min_survivors=plan.min_survivors)
        if self.max_rounds is not None:
            _at_most(self.max_rounds, num_rounds=request.num_rounds)


@final
class NoiseShare:
    """Adds this node's share to integer sums, once each is charged to the node's ledger.

    The ledger is charged with what the whole sum costs if no more honest nodes than the plan counts
    on add their shares, for the plan's unit and relation. It is charged first; a round that comes
    to nothing afterwards stays charged.

    Parameters
    ----------
    ledger : NodeLedger
    delta : float
        At which the node's ledger reports epsilon.
    policy : SharePolicy
    budget : PrivacyBudget or None
        What the data set may spend; with the ledger's delta.
    rng : RandomSource or None
        The operating system's by default. Noise that a seed reproduces is charged as none.
    """

    def __init__(
        self,
        ledger: NodeLedger,
        *,
        delta: float,
        policy: SharePolicy,
        budget: PrivacyBudget | None = None,
        rng: RandomSource | None = None,
    ) -> None:
        checks.probability(delta=delta)
        self._ledger = ledger
        self._delta = delta
        self._policy = policy
        self._budget = budget
        self._rng = secure() if rng is None else rng

    def check(self, request: DistributedRequest) -> None:
        """Raise NodeError unless policy and ledger allow the request; nothing is charged.

        Asked before the app trains: how long it takes is seen, and nobody would be charged for it.
        """
        self._policy.check(request)
        with self._planned(request) as ledger:
            if ledger.affordable(self._ledger.run, 1) < 1:
                ledger.charge(self._ledger.run)  # raises, and says why

    def added(self, request: DistributedRequest, total: NDArray[np.int64]) -> NDArray[np.int64]:
        """Charge the round, then return ``total`` plus this node's share, modulo 2^bits.

        Parameters
        ----------
        request : DistributedRequest
        total : int64 array, shape (grid.padded,)
            This node's exact sum, every unit within the plan's bound.

        Returns
        -------
        int64 array, shape (grid.padded,)
            In [0, 2^bits): to be masked, and to be added to other nodes' modulo 2^bits. Alone it is
            protected by one share only, ``plan.share_multiplier``.

        Raises
        ------
        NodeError
            POLICY_REFUSED, BUDGET_EXHAUSTED or LEDGER_REFUSED; nothing is charged.
        ValueError
            If the sum does not fit the grid.
        """
        plan = request.plan
        if total.dtype != np.int64 or total.shape != (plan.grid.padded,):
            raise ValueError(
                f"total of dtype {total.dtype} and shape {total.shape} must be int64 of shape "
                f"({plan.grid.padded},)"
            )
        self._policy.check(request)
        self._charge(request)
        return reduced(total + plan.share.sample(total.size, self._rng), bits=plan.grid.bits)

    def _charge(self, request: DistributedRequest) -> None:
        with self._planned(request) as ledger:
            ledger.charge(self._ledger.run, note={"round": request.server_round})

    @contextmanager
    def _planned(self, request: DistributedRequest) -> Iterator[Ledger]:
        """Open the ledger with this run's plan in it, if the policy allows one more round."""
        plan = request.plan
        event: Event = plan.event if self._rng.protects else Gaussian(0.0)
        with self._ledger.open(
            delta=self._delta, unit=plan.unit, relation=plan.relation, budget=self._budget
        ) as ledger:
            self._policy.node.check_release(
                ledger,
                event,
                noise_multiplier=plan.noise_multiplier if self._rng.protects else 0.0,
                total_variation=plan.total_variation,
                chosen_by_node=self._ledger.chosen_by_node,
            )
            ledger.plan(
                self._ledger.run,
                event,
                request.num_rounds,
                total_variation=plan.total_variation,
            )
            yield ledger


def noise_share_mod(
    *,
    dataset: str,
    delta: float,
    budget: PrivacyBudget | None = None,
    unit: PrivacyUnit | str | None = None,
    path: str | None = None,
) -> Mod:
    """Return a mod that adds this node's share of the noise to what the app answers.

    It stands inside secure aggregation: ``mods=[secure_aggregation_mod, noise_share_mod(...)]``.
    What it returns is protected by one share only; the masks are what the plan's other shares need.

    A train message must hold a `DistributedRequest`: this node answers no sum without noise. The
    app behind the mod is a `user_cohort_app`, which is asked for its units' integer sum, or, where
    the node is the unit, any app that returns weights: their difference from the global model is
    bounded here. Nothing else of the app's answer leaves. Messages of other kinds pass.

    Parameters
    ----------
    dataset : str
        The name of the data set, as in the node's ledger.
    delta : float
        At which the ledger reports epsilon.
    budget : PrivacyBudget or None
        What the data set may spend.
    unit : PrivacyUnit or None
        What one unit of the app is, as for `local_noise_mod`; a plan for another is refused.
    path : str or None
        The ledger's file, where the node config has no ``ledger-path``.
    """
    whose = None if unit is None else checks.choice(PrivacyUnit, unit=unit)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        try:
            policy = SharePolicy.from_node_config(context.node_config)
            if policy.enforced_survivors is None:
                policy = dataclasses.replace(policy, enforced_survivors=masks_follow())
            share = NoiseShare(
                NodeLedger.from_context(context, dataset=dataset, path=path),
                delta=delta,
                budget=budget,
                policy=policy,
            )
            return _answer(share, whose, message, context, call_next)
        except (Exception, SystemExit) as error:  # sys.exit carries text of the app's too
            return answer(error, reply_to=message)

    return mod


def _answer(
    share: NoiseShare,
    unit: PrivacyUnit | None,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> Message:
    if masks_follow() is None:
        raise NodeError(
            NodeErrorCode.SECAGG_REQUIRED,
            "a share of the noise protects a masked sum only: secure_aggregation_mod must stand "
            "before this mod: mods=[secure_aggregation_mod, noise_share_mod(...)]",
        )
    content = message.content
    found = config_record(content, records.DISTRIBUTED)
    if found is None:
        raise NodeError(
            NodeErrorCode.POLICY_REFUSED,
            "a train message without a plan for distributed noise: the strategy must be "
            "DistributedDPFedAvg, or the app must not have noise_share_mod",
        )
    try:
        request = DistributedRequest.from_config(found)
    except (ValueError, TypeError, OverflowError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
    share.check(request)
    if unit not in {None, request.plan.unit}:
        raise NodeError(
            NodeErrorCode.POLICY_REFUSED,
            f"unit={str(request.plan.unit)!r} must be {str(unit)!r}, what this app adds up",
        )
    inner = RecordDict({k: record for k, record in content.items() if k != records.DISTRIBUTED})
    # The records may be those of other nodes' messages too: they are replaced, never changed.
    message.content = inner
    with awaiting_noise(request):
        reply = call_next(message, context)
    if reply.has_error():
        raise app_failed(reply.error.code)
    try:
        if request.sampling_rate is None:
            total = _own_update(request, inner, reply.content)
        else:
            answered = array_record(reply.content, records.INTEGER_SUM)[records.SUM]
            total = read_array(answered).astype(np.int64, casting="safe")
        residues = share.added(request, total)
    except (KeyError, ValueError, TypeError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
    summed = ArrayRecord({records.SUM: Array(residues)})
    return Message(RecordDict({records.INTEGER_SUM: summed}), reply_to=message)


def _own_update(
    request: DistributedRequest, asked: RecordDict, answered: RecordDict
) -> NDArray[np.int64]:
    """Return the node's own bounded update, the node being the unit."""
    reference, arrays = (
        {name: read_array(array) for name, array in array_record(content, records.ARRAYS).items()}
        for content in (asked, answered)
    )
    layout = ArrayLayout.of(reference)
    if layout.dimension != request.grid.dimension:
        raise NodeError(
            NodeErrorCode.MALFORMED_REQUEST,
            f"dimension={request.grid.dimension} must be the model's, {layout.dimension}",
        )
    layout.check(arrays)
    bounded = request.open_sum()
    return bounded.contribution(layout.released(arrays), layout.released(reference))


def _at_least(bound: float, **value: float) -> None:
    for name, found in value.items():
        if not found >= bound:
            raise NodeError(
                NodeErrorCode.POLICY_REFUSED,
                f"{name}={found!r} must be >= {bound!r}, this node's policy",
            )


def _at_most(bound: float, **value: float) -> None:
    for name, found in value.items():
        if not found <= bound:
            raise NodeError(
                NodeErrorCode.POLICY_REFUSED,
                f"{name}={found!r} must be <= {bound!r}, this node's policy",
            )
