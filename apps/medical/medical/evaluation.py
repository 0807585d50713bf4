"""How well a model ranks held-out patients. NOT PRIVATE: held-out patients are counted exactly.

Hospitals answer with a histogram of scores for each label. Added up they give the area under the
ROC curve (AUC) over all hospitals, exact up to two patients in one bin counting as a tie.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 512

_HEALTHY: Final = "not-private.held-out-healthy"
_DISEASED: Final = "not-private.held-out-diseased"


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of held-out patients by score, for each label.

    Attributes
    ----------
    healthy, diseased
        ``BINS`` counts each, over equal parts of [0, 1].

    Examples
    --------
    >>> ScoreHistogram.of(np.array([0.1, 0.8, 0.4, 0.9]), np.array([0, 0, 1, 1])).auc
    0.75
    """

    healthy: tuple[int, ...]
    diseased: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, counts in (("healthy", self.healthy), ("diseased", self.diseased)):
            if len(counts) != BINS or min(counts) < 0:
                raise ValueError(f"{name} must be {BINS} counts >= 0, got {len(counts)} numbers")

    @classmethod
    def of(
        cls, probabilities: NDArray[np.floating], labels: NDArray[np.number]
    ) -> "ScoreHistogram":
        """Count ``probabilities`` of disease, shape ``(n,)``, by ``labels``, 0 or 1."""
        if not np.isfinite(probabilities).all():
            raise ValueError("probabilities must be finite: the model has diverged")
        bins = np.clip((probabilities * BINS).astype(int), 0, BINS - 1)
        counts = [
            np.bincount(bins[labels.astype(bool) == label], minlength=BINS).tolist()
            for label in (False, True)
        ]
        return cls(healthy=tuple(counts[0]), diseased=tuple(counts[1]))

    @classmethod
    def empty(cls) -> "ScoreHistogram":
        """Return the histogram of no patients."""
        return cls(healthy=(0,) * BINS, diseased=(0,) * BINS)

    def to_metrics(self) -> dict[str, list[int]]:
        """Return the counts as they travel."""
        return {_HEALTHY: list(self.healthy), _DISEASED: list(self.diseased)}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, object]) -> "ScoreHistogram":
        """Read what `to_metrics` wrote; raise ValueError if it is something else."""
        return cls(healthy=_counts(metrics, _HEALTHY), diseased=_counts(metrics, _DISEASED))

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        return ScoreHistogram(
            healthy=tuple(a + b for a, b in zip(self.healthy, other.healthy, strict=True)),
            diseased=tuple(a + b for a, b in zip(self.diseased, other.diseased, strict=True)),
        )

    @property
    def patients(self) -> int:
        """The number of patients counted."""
        return sum(self.healthy) + sum(self.diseased)

    @property
    def auc(self) -> float | None:
        """The chance that a diseased patient scores above a healthy one; None without both."""
        healthy, diseased = np.array(self.healthy), np.array(self.diseased)
        pairs = int(healthy.sum()) * int(diseased.sum())
        if pairs == 0:
            return None
        below = np.cumsum(healthy) - healthy
        return float((diseased * (below + healthy / 2)).sum() / pairs)


def _counts(metrics: Mapping[str, object], name: str) -> tuple[int, ...]:
    values = metrics.get(name)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} must be a list of counts")
    return tuple(values)
