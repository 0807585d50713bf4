"""What to say of a run whose reports a shuffler mixed, by the word of whoever runs it.

>>> stated = ShuffledReports.parse(100_000, num_nodes=100_000, unit=PrivacyUnit.NODE)
>>> noise = LocalNoise(clip_norm=1.0, rounds=1, delta=1e-6, noise_multiplier=4.0)
>>> said = stated.after(came=90_000, valid=90_000).statement(noise, rounds=1, dimension=10)
>>> round(said.epsilon, 2), said.reports
(0.4, 90000)
"""

import logging
from dataclasses import dataclass
from typing import Final, Self

from dpfl_flower import checks
from dpfl_flower.accounting import (
    PrivacyUnit,
    ShuffledStatement,
    shuffled_epsilon,
    shuffled_gaussian_epsilon,
)
from dpfl_flower.client.local_noise import LocalLaw, LocalNoise

__all__ = ["ShuffledReports"]

log = logging.getLogger("flwr.dpfl")

_FEWEST: Final = "fewest_reports"


@dataclass(frozen=True)
class ShuffledReports:
    """How many reports the user says were mixed, and how many there really were at least.

    Attributes
    ----------
    stated : int or None
        None: there is no shuffler, and nothing is ever said.
    fewest : int
        The fewest valid reports of a round in which any report came.
    """

    stated: int | None
    fewest: int

    @classmethod
    def parse(
        cls, stated: int | None, *, num_nodes: int, unit: PrivacyUnit, masked: bool = False
    ) -> Self:
        """Check what the user states; ``masked`` is whether reports leave their nodes under masks.

        Raises
        ------
        ValueError
            If there cannot be so many, a report is not of one unit, or there are none to mix.
        """
        if stated is not None:
            checks.positive_int(shuffled_reports=stated)
            checks.at_most(num_nodes, shuffled_reports=stated)
            if unit is not PrivacyUnit.NODE:
                raise ValueError(
                    f"shuffled_reports={stated!r} must be None for unit={str(unit)!r}: what is "
                    "mixed are the answers of nodes"
                )
            if masked:
                raise ValueError(
                    f"shuffled_reports={stated!r} must be None with secure_aggregation: it is no "
                    "shuffler, and nobody sees reports that could be mixed"
                )
        return cls(stated, num_nodes)

    def lost(self) -> "ShuffledReports":
        """Return what is known if the round that begins is never heard of: nothing of how many."""
        return ShuffledReports(self.stated, 0)

    def after(self, *, came: int, valid: int) -> "ShuffledReports":
        """Return what is known after a round in which ``came`` reports came, so many valid."""
        return ShuffledReports(self.stated, min(self.fewest, valid) if came else self.fewest)

    def to_settings(self) -> dict[str, str]:
        """Return what a checkpoint remembers."""
        return {_FEWEST: str(self.fewest)}

    def resumed(self, settings: dict[str, str]) -> "ShuffledReports":
        """Return what is known at the beginning of a later part of a run."""
        return ShuffledReports(self.stated, min(self.fewest, int(settings[_FEWEST])))

    def statement(
        self, noise: LocalNoise, *, rounds: int, dimension: int
    ) -> ShuffledStatement | None:
        """Return what may be said beside the nodes' epsilon, None where nothing may."""
        if self.stated is None or not rounds:
            return None
        reports = min(self.stated, self.fewest)
        if not reports:
            log.warning(
                "No figure for shuffled reports: of a round none was valid, or a crash lost it"
            )
            return None
        multiplier = noise.resolve_noise_multiplier()
        variation = noise.distribution(noise.grid(dimension)).total_variation * dimension
        if noise.law is LocalLaw.LAPLACE:
            spent = shuffled_epsilon(
                2 / multiplier,
                reports=reports,
                delta=noise.delta,
                rounds=rounds,
                total_variation=variation,
            )
        else:
            spent = shuffled_gaussian_epsilon(
                multiplier,
                reports=reports,
                delta=noise.delta,
                rounds=rounds,
                total_variation=variation,
            )
        return ShuffledStatement(spent, noise.delta, reports, rounds)
