"""What DP-SGD on a node is configured with: public constants only.

Nothing here may be derived from the records: a rate, a normaliser or a weight computed from their
number would tell it.

>>> config = DPSGDConfig(
...     sampling_rate=0.1, steps_per_round=5, planned_rounds=40, clip_norm=1.0,
...     expected_batch_size=20, delta=1e-4, noise_multiplier=1.2,
... )
>>> config.planned_steps, config.event(config.resolve_noise_multiplier())
(200, PoissonSampled(rate=0.1, event=Gaussian(noise_multiplier=1.2)))
"""

import functools
from dataclasses import dataclass

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Composed,
    Event,
    Gaussian,
    PoissonSampled,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    calibrate_event,
)
from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.noise_source import NoiseSource
from dpfl_flower.clipping import AdaptiveClipping


@dataclass(frozen=True, kw_only=True)
class DPSGDConfig:
    """The public configuration of DP-SGD (Abadi et al., arXiv 1607.00133, Algorithm 1).

    Parameters
    ----------
    sampling_rate : float
        Each step takes every record by its own coin of this probability. 1.0: all records in every
        step, without amplification.
    steps_per_round : int
        Local steps between two answers.
    planned_rounds : int
        The rounds that one run may ask for; the node refuses more.
    clip_norm : float
        The L2 norm that bounds each record's gradient, over all trainable parameters.
    expected_batch_size : float
        What the noisy sum is divided by: a public guess of ``sampling_rate`` times the number of
        records, the same whatever their number is.
    delta : float
        Below ``sampling_rate / expected_batch_size``, one over the public number of records.
    noise_multiplier : float, optional
        The noise's standard deviation in units of ``clip_norm``. Either this or:
    target_epsilon : float, optional
        What ``planned_rounds`` rounds may cost. It is also the budget of the data set: charges of
        earlier runs in the node's ledger count, and past it the node refuses.
    relation : Relation
        How neighbouring data sets differ in one record.
    weight : int
        The public ``num-examples`` of every answer.
    adaptive_clipping : AdaptiveClipping, optional
        How the clip norm follows a quantile of the gradients' norms from step to step; its
        ``initial`` is ``clip_norm``. Each step then also releases a noisy count. The noise on the
        gradients is raised by what the count costs (arXiv 1905.03871, Theorem 1), so that both
        together are the one Gaussian release of ``noise_multiplier`` that the ledger is charged.
    clip_style : ClipStyle
        What the clip norm bounds: the whole gradient (``flat``), each layer's part of it
        (``per-layer``), or its length in any case (``automatic``). Epsilon is the same.
    mixed_precision : bool
        Run the model in bfloat16 where torch's autocast does. Norms, sums and noise are not.
    max_physical_batch_size : int
        The most records in memory at once; a larger sample is summed in parts.
    noise_source : NoiseSource
        ``device-philox`` draws the noise on gradients on a CUDA device: faster for large models,
        and not cryptographic, which is said wherever epsilon is. Only for nodes that allow it.

    Raises
    ------
    ValueError
        With the name, the value and the bound of what is out of bounds.
    """

    sampling_rate: float
    steps_per_round: int
    planned_rounds: int
    clip_norm: float
    expected_batch_size: float
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    weight: int = 1
    adaptive_clipping: AdaptiveClipping | None = None
    clip_style: ClipStyle = ClipStyle.FLAT
    mixed_precision: bool = False
    max_physical_batch_size: int = 64
    noise_source: NoiseSource = NoiseSource.HOST

    def __post_init__(self) -> None:
        checks.fraction(sampling_rate=self.sampling_rate)
        checks.positive_int(
            steps_per_round=self.steps_per_round,
            planned_rounds=self.planned_rounds,
            weight=self.weight,
            max_physical_batch_size=self.max_physical_batch_size,
        )
        checks.positive(clip_norm=self.clip_norm, expected_batch_size=self.expected_batch_size)
        checks.probability(delta=self.delta)
        if not self.delta * self.expected_batch_size < self.sampling_rate:
            raise ValueError(
                f"delta={self.delta!r} must be < {self.sampling_rate / self.expected_batch_size:g} "
                "= sampling_rate/expected_batch_size, one over the public number of records"
            )
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier!r} and "
                f"target_epsilon={self.target_epsilon!r}: one of them must be given, not both"
            )
        if self.noise_multiplier is not None:
            checks.non_negative(noise_multiplier=self.noise_multiplier)
        else:
            checks.positive(target_epsilon=self.target_epsilon)
        object.__setattr__(self, "relation", Relation(self.relation))
        object.__setattr__(self, "clip_style", ClipStyle(self.clip_style))
        object.__setattr__(self, "noise_source", NoiseSource(self.noise_source))
        if self.adaptive_clipping is not None:
            self._check_adaptive_clipping(self.adaptive_clipping)

    def _check_adaptive_clipping(self, adaptive: AdaptiveClipping) -> None:
        if adaptive.initial != self.clip_norm:
            raise ValueError(
                f"adaptive_clipping.initial={adaptive.initial!r} must be "
                f"clip_norm={self.clip_norm!r}"
            )
        if self.clip_style is not ClipStyle.FLAT:
            raise ValueError(
                f"clip_style={self.clip_style.value!r} must be 'flat' with adaptive_clipping: the "
                "quantile is of whole norms"
            )
        if self.noise_multiplier is not None:  # the same for one that is yet to be calibrated
            adaptive.update_noise_multiplier(self.noise_multiplier, self.expected_batch_size)

    @property
    def planned_steps(self) -> int:
        """The steps of a whole run, each one release in the ledger."""
        return self.planned_rounds * self.steps_per_round

    @property
    def budget(self) -> PrivacyBudget | None:
        """The budget of the data set, None where only the noise is given."""
        if self.target_epsilon is None:
            return None
        return PrivacyBudget(self.target_epsilon, self.delta, PrivacyUnit.EXAMPLE, self.relation)

    def event(self, noise_multiplier: float) -> Event:
        """Return one step as the ledger knows it."""
        release = Gaussian(noise_multiplier)
        return release if self.sampling_rate == 1 else PoissonSampled(self.sampling_rate, release)

    def resolve_noise_multiplier(self, *, total_variation: float = 0.0) -> float:
        """Return the noise multiplier, calibrated to ``target_epsilon`` where that was given.

        ``total_variation`` bounds how far the noise of one step is from its exact distribution.
        """
        return _noise_multiplier(self, total_variation)


@functools.lru_cache(maxsize=64)
def _noise_multiplier(config: DPSGDConfig, total_variation: float) -> float:
    budget = config.budget
    if budget is None:
        assert config.noise_multiplier is not None
        return float(config.noise_multiplier)
    return calibrate_event(
        lambda z: Composed(config.event(z), config.planned_steps),
        budget,
        total_variation=total_variation * config.planned_steps,
    )
