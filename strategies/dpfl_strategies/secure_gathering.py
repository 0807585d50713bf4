"""The sum of a round by secure aggregation: the server learns it and no single vector.

Whom to ask, and what of, is what it would be without; only the vectors are bounded by the nodes
themselves, masked, and summed under their masks.
"""

from collections.abc import Iterable, Sequence
from typing import final

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import records
from dpfl_flower.accounting import (
    CustomSampling,
    EveryoneSampling,
    PrivacyUnit,
    Relation,
    TrustModel,
)
from dpfl_flower.client.contribution import SumBound
from dpfl_flower.quantize import IntegerGrid
from dpfl_flower.quantize.grid import LARGEST_SENSITIVITY_UNITS
from dpfl_flower.secagg import (
    SecureAggregation,
    Session,
    SumRequest,
    encoding_without_wrap,
    fewest_bits,
    masked_grid,
    terms_of,
)
from dpfl_strategies.gathering import Asked, Gathered, Gathering
from dpfl_strategies.messages import Arrays
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.private_run import GridOf, PrivateRun
from dpfl_strategies.secure_round import SecureRound, no_room, round_seconds, unfinished
from dpfl_strategies.weighting import NumExamplesWeighting, UniformWeighting, Weighting

__all__ = ["SecureGathering"]


@final
class SecureGathering(Gathering):
    """Asks as another gathering does, and sums by secure aggregation.

    Parameters
    ----------
    inner : Gathering
        Whom to ask.
    secure : SecureAggregation
        The protocol.
    request : PrivacyRequest
        Unit, relation and sampling.
    weighting : Weighting or None
        How nodes are to weigh; None where only the strategy's own code knows.

    Raises
    ------
    ValueError
        Where nodes could not be told how to weigh, where the relation would not cover that a round
        may be abandoned, and where a sum might wrap around.
    """

    def __init__(
        self,
        inner: Gathering,
        secure: SecureAggregation,
        *,
        request: PrivacyRequest,
        weighting: Weighting | None,
    ) -> None:
        self._inner = inner
        self._secure = secure
        self._w_max = _w_max(weighting)
        self._nodes_are_units = request.unit is PrivacyUnit.NODE
        if self._nodes_are_units and request.relation is Relation.ADD_OR_REMOVE_ONE:
            raise ValueError(
                f"relation={str(request.relation)!r} must be 'zero-out' or 'replace-one' with "
                "secure_aggregation and unit='node': a round with too few nodes is abandoned, "
                "which shows whether a node is there; zero-out costs the same epsilon and covers "
                "what the node holds"
            )
        if self._nodes_are_units and not isinstance(
            request.sampling, EveryoneSampling | CustomSampling
        ):
            raise ValueError(
                f"sampling={request.sampling!r} must be EveryoneSampling or a CustomSampling with "
                "secure_aggregation and unit='node': rounds with too few nodes are abandoned, so "
                "that those which are released hold a node more often than its coin says, and the "
                "price of the coins does not hold"
            )
        drawn = request.sampling.max_cohort if self._nodes_are_units else None
        asked = request.sampling.expected_cohort if self._nodes_are_units else inner.num_nodes
        if secure.max_cohort is not None and secure.max_cohort < asked:
            raise ValueError(
                f"max_cohort={secure.max_cohort} must be >= {asked:g}, the nodes that are asked in "
                "a round"
            )
        self._max_cohort = secure.max_cohort or drawn or inner.num_nodes
        self._never_more = drawn is not None and drawn <= self._max_cohort
        self._units = 1 if self._nodes_are_units else request.sampling.population
        secure.check_population(inner.num_nodes)
        self._bound(LARGEST_SENSITIVITY_UNITS)
        self._round: SecureRound | None = None

    @property
    def name(self) -> str:
        """The inner gathering's, and the protocol's."""
        return f"{self._inner.name} by {type(self._secure).__name__}"

    @property
    def trust(self) -> TrustModel:
        """Secure: the server learns the exact sum."""
        return TrustModel.SECURE

    @property
    def num_nodes(self) -> int:
        """How many nodes there must be."""
        return self._inner.num_nodes

    def choose_grid(self, at_least: GridOf) -> IntegerGrid:
        """Return the grid with which masked vectors take the fewest bytes; see `masked_grid`."""
        return masked_grid(at_least, parties=self._max_cohort, units=self._units)

    def prepare(self, run: PrivateRun) -> None:
        """Check that sums fit, and forget a round that was never finished."""
        self._bound(run.largest_entry)
        self._round = None

    def ask(
        self, run: PrivateRun, server_round: int, registry: Sequence[int], reference: Arrays
    ) -> Asked:
        """Draw the cohort; ValueError before anyone is asked if there could be too many."""
        if len(registry) > self._max_cohort and not self._never_more:
            raise no_room(self._secure, parties=self._max_cohort, nodes=len(registry))
        asked = self._inner.ask(run, server_round, registry, reference)
        bound = self._bound(run.largest_entry)
        extra = RecordDict(dict(asked.records))
        if self._nodes_are_units:
            request = run.update_request(bound, dither_seed=asked.dither_seed, w_max=self._w_max)
            extra[records.UPDATE] = request.to_config()
        else:
            extra[records.UPDATE] = bound.to_config()
        self._width = run.width
        self._encoding = encoding_without_wrap(bound.largest, bound.parties, run.width)
        self._largest = bound.largest
        return Asked(server_round, asked.nodes, reference, asked.dither_seed, extra)

    def messages(
        self, asked: Asked, *, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Begin the exchange; the model goes along later, to the nodes that compute."""
        config[records.SERVER_ROUND] = asked.server_round
        task = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
        for name, record in asked.records.items():
            task[name] = record
        request = SumRequest(
            session=Session(grid.run.run_id, asked.server_round, terms_of(task)),
            nodes=tuple(asked.nodes),
            width=self._width,
            bits=self._encoding.bits,
            lanes=self._encoding.lanes,
            seconds=round_seconds(self.stage_seconds),
            largest=self._largest,
        )
        self._round = SecureRound(self._secure, request, task)
        return self._round.messages()

    def proceed(self, asked: Asked, replies: Iterable[Message]) -> list[Message] | None:
        """Return the next stage's messages; None once the sum is there, or given up."""
        del asked
        return None if self._round is None else self._round.proceed(replies)

    def gather(self, run: PrivateRun, asked: Asked, replies: Iterable[Message]) -> Gathered | None:
        """Return the sum, None for an abandoned round.

        Raises
        ------
        RuntimeError
            If the exchange has not come to its end.
        """
        current, self._round = self._round, None
        if current is None or not current.finished:
            raise unfinished(asked.server_round)
        if current.total is None:
            return None
        return Gathered(current.total.total, len(current.total.survivors), [])

    def _bound(self, largest_entry: int) -> SumBound:
        """Return the bound on each node's vector; ValueError where the sum could wrap around."""
        bound = SumBound(largest=largest_entry * self._units, parties=self._max_cohort)
        try:
            fewest_bits(bound.largest, bound.parties)
        except ValueError as error:
            raise ValueError(
                f"max_cohort={self._max_cohort} is too large for the vectors of this run: {error}"
            ) from error
        return bound


def _w_max(weighting: Weighting | None) -> float:
    """Return what tells a node how to weigh: ``w_max``, 0 for uniform weights."""
    if type(weighting) is UniformWeighting:
        return 0.0
    if type(weighting) is NumExamplesWeighting:
        return weighting.w_max
    raise ValueError(
        f"weighting={weighting!r} must be UniformWeighting or NumExamplesWeighting with "
        "secure_aggregation, and weigh() that of DPFedAvg: nodes weigh themselves, by public "
        "constants"
    )
