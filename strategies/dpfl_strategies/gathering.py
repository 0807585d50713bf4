"""Where the units are, and so who is asked and what one round's integer sum is made of.

Either every node is one unit and answers its weights, which the server bounds; or every node holds
many units, draws and bounds them itself, and answers one integer sum. What comes after, charge,
noise and release, is the same.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.accounting import (
    EveryoneSampling,
    PoissonSampling,
    PrivacyUnit,
    Sampling,
    TrustModel,
)
from dpfl_flower.federated_dropout import FederatedDropout, Submodel
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import USUAL_NOISE_UNITS, IntegerGrid
from dpfl_flower.rng import RandomSource
from dpfl_strategies.messages import Arrays, to_messages, to_record
from dpfl_strategies.private_run import GridOf, PrivateRun
from dpfl_strategies.replies import accepted, dropout, parse_sum, parse_train

Weigh = Callable[[float], float]

log = logging.getLogger("flwr.dpfl")

_LARGEST_SUM: Final = 2**62
_SEED_BYTES: Final = 16


@dataclass(frozen=True)
class Asked:
    """The round that waits for replies.

    ``records`` go into every message beside the model; ``submodels`` names the nodes that get only
    a part of it.
    """

    server_round: int
    nodes: Sequence[int]
    reference: Arrays
    dither_seed: bytes | None
    records: RecordDict
    submodels: Mapping[int, Submodel] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """The exact, un-noised sum of one round, and how many nodes answered: never released."""

    total: NDArray[np.int64]
    answered: int
    contents: Sequence[RecordDict]


class Gathering(ABC):
    """Who is asked in a round, and how the replies become one integer sum.

    Attributes
    ----------
    stage_seconds : float
        How long the replies to one exchange of messages are waited for.
    """

    stage_seconds: float = 3600.0

    @property
    def name(self) -> str:
        """What may not change between the parts of a resumed run."""
        return type(self).__name__

    @property
    def trust(self) -> TrustModel:
        """What the server learns."""
        return TrustModel.CENTRAL

    @property
    @abstractmethod
    def num_nodes(self) -> int:
        """How many nodes there must be before anyone is asked."""

    @abstractmethod
    def ask(
        self, run: PrivateRun, server_round: int, registry: Sequence[int], reference: Arrays
    ) -> Asked:
        """Draw the round's cohort from the registered nodes."""

    def choose_grid(self, at_least: GridOf) -> IntegerGrid:
        """Return a run's grid, of those that ``at_least`` makes given the least s they may have."""
        return at_least(USUAL_NOISE_UNITS)

    def prepare(self, run: PrivateRun) -> None:
        """Check the run's plan before its first round; ValueError where it cannot work."""
        del run

    def messages(
        self, asked: Asked, *, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the round's first messages, one for each node."""
        del grid
        return to_messages(
            asked.nodes,
            MessageType.TRAIN,
            server_round=asked.server_round,
            arrays=arrays,
            config=config,
            extra=asked.records,
            part_of=lambda node: _part(asked, node),
        )

    def proceed(self, asked: Asked, replies: Iterable[Message]) -> list[Message] | None:
        """Return what to send once these replies are there, None where they are the last ones."""
        del asked, replies
        return None

    @abstractmethod
    def gather(self, run: PrivateRun, asked: Asked, replies: Iterable[Message]) -> Gathered | None:
        """Bound and sum the replies; whatever is wrong with one makes it a dropout.

        None where the sum cannot be had: the round is abandoned, and nothing of it is released.
        """

    def unbiased(self, update: NDArray[np.float64], layout: ArrayLayout) -> NDArray[np.float64]:
        """Return the mean update, shape ``(d,)``, with public constants put right that bias it."""
        return update


def _part(asked: Asked, node: int) -> ArrayRecord | None:
    """Return the part of the model that a node is sent, None for all of it."""
    part = asked.submodels.get(node)
    return None if part is None else to_record(part.take(asked.reference))


@final
class NodesAreUnits(Gathering):
    """Every node is one unit: the server draws nodes, and bounds what they return.

    Under federated dropout a node is sent a part of the model and moves nothing else; the mean is
    divided by how likely each entry is to be in a part.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        rng: RandomSource,
        weigh: Weigh,
        federated_dropout: FederatedDropout | None = None,
    ) -> None:
        self._sampling = sampling
        self._rng = rng
        self._weigh = weigh
        self._dropout = federated_dropout

    @property
    def num_nodes(self) -> int:
        """The population."""
        return self._sampling.population

    def ask(
        self, run: PrivateRun, server_round: int, registry: Sequence[int], reference: Arrays
    ) -> Asked:
        """Draw nodes with coins of the server's own."""
        nodes = self._sampling.draw(registry, self._rng)
        submodels = {}
        if self._dropout is not None:
            seed = self._rng.random_bytes(_SEED_BYTES)  # public from here on
            submodels = {
                node: self._dropout.submodel(reference, seed=seed, node_id=node) for node in nodes
            }
        return Asked(server_round, nodes, reference, run.dither_seed(), RecordDict(), submodels)

    def gather(self, run: PrivateRun, asked: Asked, replies: Iterable[Message]) -> Gathered:
        """Weigh, clip, round and sum each node's update."""
        bounded = run.open_sum(asked.dither_seed)
        reference = run.layout.released(asked.reference)
        contents = []
        missing: Counter[str] = Counter()
        for message in accepted(replies, asked=asked.nodes, group=str(asked.server_round)):
            part = asked.submodels.get(message.metadata.src_node_id)
            sent = asked.reference if part is None else part.take(asked.reference)
            reply = parse_train(message, run.layout if part is None else ArrayLayout.of(sent))
            if reply is None:
                continue
            arrays, start = reply.arrays, reference
            try:
                if part is not None:
                    arrays = part.scatter(arrays, asked.reference)
                    start = run.layout.released(part.scatter(sent, asked.reference))
                weight = self._weigh(reply.num_examples)
                places = run.ranges.places(reply.metrics)
                bounded.add(
                    run.layout.released(arrays),
                    start,
                    weight=weight,
                    metrics=places,
                )
            except Exception as failed:  # one unit's numbers must neither stop the run nor show
                dropout(message, failed)
                continue
            missing.update(run.ranges.missing(places))
            contents.append(RecordDict({records.METRICS: reply.metrics}))
        if missing:
            log.warning(
                "NOT PRIVATE: round %d: replies without a finite number for a metric, which counts"
                " as the middle of its range: %s of %d",
                asked.server_round,
                ", ".join(
                    f"{name} in {missing[name]}" for name in run.ranges.names if missing[name]
                ),
                len(contents),
            )
        return Gathered(bounded.total, len(contents), contents)

    def unbiased(self, update: NDArray[np.float64], layout: ArrayLayout) -> NDArray[np.float64]:
        """Divide each entry by the share of nodes that train it."""
        return update if self._dropout is None else update / self._dropout.keep_probability(layout)


@final
class UnitsInsideNodes(Gathering):
    """Every node holds many units: all nodes are asked, and each draws and bounds its own.

    A node's coins stay in the node, and so does the number of units that took part. Somebody with
    records in two nodes is two units.

    Parameters
    ----------
    sampling:
        Poisson, whose rate becomes that of the nodes' coins, or everyone.
    num_nodes:
        How many nodes there are; ``sampling.population`` counts units over all of them.

    Raises
    ------
    ValueError
        If the unit is a node, or the sampling needs to see all units at once.
    """

    def __init__(self, sampling: Sampling, *, num_nodes: int, unit: PrivacyUnit) -> None:
        checks.positive_int(num_nodes=num_nodes)
        if unit is PrivacyUnit.NODE:
            raise ValueError(
                f"unit={str(unit)!r} must be 'user' or 'example' with num_nodes={num_nodes}: each "
                "node then holds many units"
            )
        if not isinstance(sampling, PoissonSampling | EveryoneSampling):
            raise ValueError(
                f"sampling={sampling!r} must be PoissonSampling or EveryoneSampling with "
                f"num_nodes={num_nodes}: nodes draw their own units, and only coins can be drawn "
                "apart"
            )
        self._rate = sampling.rate if isinstance(sampling, PoissonSampling) else 1.0
        self._num_nodes = num_nodes

    @property
    def num_nodes(self) -> int:
        """The nodes, not the units."""
        return self._num_nodes

    def ask(
        self, run: PrivateRun, server_round: int, registry: Sequence[int], reference: Arrays
    ) -> Asked:
        """Ask every node, telling it the round's public constants."""
        seed = run.dither_seed()
        request = run.cohort_request(server_round, sampling_rate=self._rate, dither_seed=seed)
        extra = RecordDict({records.COHORT: request.to_config()})
        return Asked(server_round, registry, reference, seed, extra)

    def gather(self, run: PrivateRun, asked: Asked, replies: Iterable[Message]) -> Gathered:
        """Add the nodes' integer sums; together they cannot wrap around 64 bits."""
        total = run.open_sum(asked.dither_seed).total
        bound = _LARGEST_SUM // max(1, len(asked.nodes))
        contents = []
        for message in accepted(replies, asked=asked.nodes, group=str(asked.server_round)):
            part = parse_sum(message, width=total.size, bound=bound)
            if part is not None:
                total += part
                contents.append(_metrics(message))
        return Gathered(total, len(contents), contents)


def _metrics(message: Message) -> RecordDict:
    found: dict[str, Any] = dict(message.content.metric_records)
    return RecordDict(found)
