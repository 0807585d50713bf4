"""What nodes that add their own noise claim to have spent, and what that means for one person."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from flwr.app import ConfigRecord

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Composed,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Event,
    PrivacyUnit,
    Relation,
    event_from_json,
)
from dpfl_flower.accounting.accountant import quick_epsilon, require_supported
from dpfl_flower.accounting.events import count_events
from dpfl_flower.accounting.statement import noise_caveat, rounded_up

log = logging.getLogger("flwr.dpfl")

_SAME_PRICE: Final = 1e-3
"""By how much two pricings of the same events may differ."""

_LONGEST_CLAIM: Final = 1 << 20
"""Characters of a claim's events; an honest node lists each kind of release once."""


@dataclass(frozen=True)
class NodeClaim:
    """What one node says it has spent on its data set so far.

    ``claimed`` is the epsilon that the node wrote. ``durable`` is False where the node keeps no
    ledger file: then the claim covers this run only. ``cryptographic`` is False where the node says
    that some of its noise was drawn by a generator that is not, or says anything but True.
    """

    dataset: str
    claimed: float
    delta: float
    unit: PrivacyUnit
    relation: Relation
    durable: bool
    events: tuple[Event, ...]
    cryptographic: bool = True

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "NodeClaim":
        """Parse a node's public claim.

        Raises
        ------
        ValueError
            If a field is missing, of the wrong type or out of range.
        """
        try:
            delta = float(record["delta"])  # type: ignore[arg-type]
            claimed = float(record["epsilon"])  # type: ignore[arg-type]
            relation = Relation(str(record["relation"]))
            text = str(record["events"])
            if len(text) > _LONGEST_CLAIM:
                raise ValueError(f"events of {len(text)} characters must be <= {_LONGEST_CLAIM}")
            events = tuple(event_from_json(e) for e in json.loads(text))
            unit = PrivacyUnit(str(record["unit"]))
            dataset, durable = str(record["dataset"]), bool(record["durable"])
        except (KeyError, TypeError, AttributeError, RecursionError) as missing:
            raise ValueError(f"the node's privacy claim is malformed: {missing!r}") from missing
        checks.probability(delta=delta)
        if math.isnan(claimed) or claimed < 0:
            raise ValueError(f"epsilon={claimed!r} must be a number >= 0")
        for event in events:
            require_supported(event, relation, unit=unit)
        return cls(
            dataset=dataset,
            claimed=claimed,
            delta=delta,
            unit=unit,
            relation=relation,
            durable=durable,
            events=events,
            # A claim without the field is one of a node that has no other noise.
            cryptographic=record.get("cryptographic", True) is True,
        )

    def to_json(self) -> dict[str, str | float | bool]:
        """Return the claim as JSON-able data, the fields of the record it was read from."""
        return {
            "dataset": self.dataset,
            "epsilon": self.claimed,
            "delta": self.delta,
            "unit": str(self.unit),
            "relation": str(self.relation),
            "durable": self.durable,
            "cryptographic": self.cryptographic,
            "events": json.dumps([event.to_json() for event in self.events]),
        }

    def after(self, earlier: "NodeClaim | None") -> "NodeClaim":
        """Return this claim together with what the node claimed before the server was restarted.

        A durable claim covers all of it already; any other began anew, and composes: by its events
        where they explain the claim, else in the plainest way, epsilons and deltas added.
        """
        if earlier is None or self.durable:
            return self
        both = (earlier, self)
        return dataclasses.replace(
            self,
            claimed=_composed_epsilon(both, _composed_delta(both), _one_after_the_other),
            delta=_composed_delta(both),
            events=earlier.events + self.events,
            cryptographic=earlier.cryptographic and self.cryptographic,
        )

    @property
    def epsilon(self) -> float:
        """The larger of what the node wrote and what its events cost when priced here."""
        return max(self.claimed, self._price)

    @property
    def explained(self) -> bool:
        """Whether its events cost what the node wrote; else there is more than it tells."""
        return self.claimed <= self._price * (1 + _SAME_PRICE)

    @property
    def beyond_events(self) -> float:
        """What the node wrote beyond what its events cost: a rounding, where they explain it."""
        return max(0.0, self.claimed - self._price) if self.claimed < math.inf else 0.0

    @property
    def _price(self) -> float:
        return _priced(self.events, self.delta, self.relation)


def _composed_delta(claims: Collection[NodeClaim]) -> float:
    """Return the delta at which claims compose: the events' own, and those of the others added."""
    explained = max((claim.delta for claim in claims if claim.explained), default=0.0)
    return explained + sum(claim.delta for claim in claims if not claim.explained)


Events = tuple[Event, ...]


def _one_after_the_other(parts: Iterable[Events]) -> Events:
    return tuple(event for events in parts for event in events)


def _composed_epsilon(
    claims: Collection[NodeClaim], delta: float, joined: Callable[[Iterable[Events]], Events]
) -> float:
    """Return epsilon of all claims together; infinite where their relations or deltas forbid it.

    Events are ``joined`` and priced as one; what they do not explain is basic composition (Dwork
    and Roth, Theorem 3.16).
    """
    if len({claim.relation for claim in claims}) > 1 or delta >= 1:
        return math.inf
    if not claims:
        return 0.0
    relation = next(iter(claims)).relation
    explained = [claim for claim in claims if claim.explained]
    events = joined(claim.events for claim in explained)
    at = max((claim.delta for claim in explained), default=delta)
    total = _priced(events, at, relation) if events else 0.0
    total += sum(claim.beyond_events for claim in explained)
    total += sum(claim.epsilon for claim in claims if not claim.explained)
    return max(total, *(claim.epsilon for claim in claims))


def _together(of_nodes: Iterable[Events]) -> Events:
    """Return what someone who is in every node has taken part in.

    Releases that nodes make on their own compose. A sum with distributed noise is one release that
    all of its nodes write down: whoever is in h of them moves it h times as far, which costs more
    than h releases would, so that events which are equal in h ledgers are taken to be that.
    """
    own: list[Event] = []
    shared: dict[Event, list[int]] = {}
    for events in of_nodes:
        for event, count in count_events(events).items():
            if isinstance(event, DistributedDiscreteGaussian | DistributedSkellam):
                shared.setdefault(event, []).append(count)
            else:
                own.append(Composed(event, count))
    for event, counts in shared.items():
        assert isinstance(event, DistributedDiscreteGaussian | DistributedSkellam)
        moved = dataclasses.replace(
            event,
            l2_sensitivity=len(counts) * event.l2_sensitivity,
            l1_sensitivity=len(counts) * event.l1_sensitivity,
        )
        own.append(Composed(moved, max(counts)))
    return tuple(own)


@functools.lru_cache(maxsize=256)
def _priced(events: tuple[Event, ...], delta: float, relation: Relation) -> float:
    try:
        return quick_epsilon(events, delta=delta, relation=relation)
    except Exception:  # a claim that has no price must not end the run, and is never believed
        log.warning("A node's privacy claim cannot be priced: its epsilon counts as infinite")
        return math.inf


@dataclass(frozen=True)
class NodePrivacyReport:
    """The claims of all nodes, the worst, and their composition.

    A person whose records lie in one node gets that node's epsilon; a person with records in
    several nodes gets the composition of theirs, at most ``epsilon_everywhere``.
    """

    claims: Mapping[int, NodeClaim] = field(default_factory=dict)

    @property
    def worst(self) -> NodeClaim | None:
        """The claim with the largest epsilon."""
        return max(self.claims.values(), key=lambda claim: claim.epsilon, default=None)

    @property
    def delta(self) -> float:
        """The delta of ``epsilon_everywhere``; the largest claimed where events explain all."""
        return _composed_delta(self.claims.values())

    def epsilon_everywhere(self) -> float:
        """Return epsilon, at ``delta``, of someone with a record in every node.

        Infinite where the nodes' relations differ: such claims do not compose.
        """
        return _composed_epsilon(self.claims.values(), self.delta, _together)

    def __str__(self) -> str:
        """One sentence that names the units, the relation and both figures."""
        worst = self.worst
        if worst is None:
            return "no node made a privacy claim"
        scope = "" if all(c.durable for c in self.claims.values()) else "; this run only"
        caveat = noise_caveat(cryptographic=all(c.cryptographic for c in self.claims.values()))
        one, everywhere = rounded_up(worst.epsilon), rounded_up(self.epsilon_everywhere())
        # The largest of both, whosever they are: an epsilon at a smaller delta holds there too.
        most = max(claim.delta for claim in self.claims.values())
        units = " or ".join(sorted({str(claim.unit) for claim in self.claims.values()}))
        return (
            f"at most epsilon {one} at delta {most:g} for each {units} "
            f"({worst.relation}) of one node, epsilon {everywhere} at delta {self.delta:g} for "
            f"someone in all {len(self.claims)} nodes, as the nodes claim{scope}{caveat}"
        )


def read_claim(node_id: int, record: ConfigRecord | None) -> NodeClaim | None:
    """Return the node's claim, None (and one log line) where it made none that can be read."""
    if record is None:
        log.warning("Node %d made no privacy claim: its reply counts as a dropout", node_id)
        return None
    try:
        return NodeClaim.from_record(record)
    except Exception:  # whatever a node wrote, it must not end the run
        log.warning("Node %d's privacy claim is malformed: its reply counts as a dropout", node_id)
        return None
