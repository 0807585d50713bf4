"""What a run is going to release, written down before its first charge.

>>> from dpfl_flower.accounting.events import Gaussian
>>> plan = Plan("model", Gaussian(1.1), count=100)
>>> Plan.from_json(plan.to_json()) == plan
True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dpfl_flower.accounting.events import Event, event_from_json
from dpfl_flower.checks import non_negative, positive_int


@dataclass(frozen=True)
class Plan:
    """The event that every charge of a run is, fixed before the first one.

    Parameters
    ----------
    run : str
        The run's name within the ledger.
    event : Event
        One release: the dominating one, where rounds differ.
    count : int
        How many releases the run may make in all.
    max_charge : int
        How many releases one charge may be for. What a torn line is taken to have been for.
    total_variation : float
        An upper bound, per release, on the total variation distance between the noise that is drawn
        and the event's exact distribution.
    """

    run: str
    event: Event
    count: int
    max_charge: int = 1
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        positive_int(count=self.count, max_charge=self.max_charge)
        non_negative(total_variation=self.total_variation)
        object.__setattr__(self, "count", int(self.count))
        object.__setattr__(self, "max_charge", int(self.max_charge))
        object.__setattr__(self, "total_variation", float(self.total_variation))
        if not self.run or not isinstance(self.run, str):
            raise ValueError(f"run={self.run!r} must be a name")
        if not isinstance(self.event, Event):
            raise ValueError(f"event={self.event!r} must be an Event")

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        return {
            "kind": "plan",
            "run": self.run,
            "event": self.event.to_json(),
            "count": self.count,
            "max_charge": self.max_charge,
            "total_variation": self.total_variation,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the plan that `to_json` wrote."""
        fields = {key: data[key] for key in ("run", "count", "max_charge", "total_variation")}
        return cls(event=event_from_json(data["event"]), **fields)
