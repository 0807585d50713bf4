"""The clip norm from step to step: fixed, or after a noisy quantile of the gradients' norms.

>>> from dpfl_flower.rng import SeededRandom
>>> config = DPSGDConfig(
...     sampling_rate=0.1, steps_per_round=5, planned_rounds=40, clip_norm=1.0,
...     expected_batch_size=100, delta=1e-4, noise_multiplier=1.0,
...     adaptive_clipping=AdaptiveClipping(initial=1.0),
... )
>>> norms = ClipNorms(config, NodeLedger("demo"), noise_multiplier=1.0, rng=SeededRandom(1))
>>> round(norms.noise_multiplier, 6)  # charged as 1.0: the rest pays for the count
1.005038
>>> norms.update(lambda: torch.tensor(50.0))  # all hundred fit: the clip norm falls
>>> norms.current < 1.0
True
"""

from collections.abc import Callable
from typing import Final

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from dpfl_flower import records
from dpfl_flower.client.dp_sgd_config import DPSGDConfig
from dpfl_flower.client.node_ledger import NodeLedger
from dpfl_flower.client.noisy_gradient import NoisyGradient, sum_grid
from dpfl_flower.clipping import AdaptiveClipping
from dpfl_flower.rng import RandomSource

_HALF: Final = 0.5
"""What one record adds to the count, or takes from it."""

__all__ = ["AdaptiveClipping", "ClipNorms", "DPSGDConfig", "NodeLedger", "torch"]


class ClipNorms:
    """Follows `DPSGDConfig.adaptive_clipping`; without one the clip norm stays.

    Source: Andrew et al., arXiv 1905.03871, Algorithm 1, with steps for rounds. A clip norm is
    computed from released counts and public constants only. It goes on from round to round in the
    state of the run, and starts anew where that is lost, which costs nothing.

    The count moves by 1/2 with one record, the sum of gradients by C; under replace-one both by
    twice that. So the split of the noise is the same for every relation.
    """

    def __init__(
        self,
        config: DPSGDConfig,
        ledger: NodeLedger,
        *,
        noise_multiplier: float,
        rng: RandomSource,
    ) -> None:
        self._policy = config.adaptive_clipping
        self._ledger = ledger
        self.current = config.clip_norm
        """The clip norm of the next step."""
        self.noise_multiplier = noise_multiplier
        """The standard deviation of the noise on the next sum of gradients, in clip norms."""
        self._count: NoisyGradient | None = None
        if self._policy is None:
            return
        expected = config.expected_batch_size
        self.noise_multiplier = self._policy.update_noise_multiplier(noise_multiplier, expected)
        stddev = self._policy.indicator_stddev(noise_multiplier, expected)
        self._count = NoisyGradient(stddev / _HALF, expected, rng)
        kept = ledger.state.config_records.get(self._key)
        if kept is not None and kept["run"] == ledger.run:
            self.current = float(str(kept["clip-norm"]))

    def total_variation(self, dimension: int) -> float:
        """Return how far the noise of a step is from exact, with so many trained parameters."""
        astray = 0.0
        if self.noise_multiplier:
            astray += sum_grid(self.noise_multiplier, dimension).total_variation
        if self._count is not None and self._count.noise_multiplier:
            astray += sum_grid(self._count.noise_multiplier, 1).total_variation
        return astray

    def update(self, fitting: Callable[[], Tensor]) -> None:
        """Release the noisy count of a step and choose the next clip norm.

        The host waits for the count, on an accelerator too: the next clip norm is kept in the
        run's state. Where the clip norm stays, nothing is asked for.

        Parameters
        ----------
        fitting : Callable[[], Tensor]
            Returns the sum over the step's records of +1/2 or -1/2: `SampleSum.fitting`.
        """
        if self._policy is None or self._count is None:
            return
        (noisy,) = self._count([fitting().reshape(1)], clip_norm=_HALF)
        self.current = self._policy.updated(self.current, float(noisy) + 0.5)
        self._ledger.state[self._key] = ConfigRecord(
            {"run": self._ledger.run, "clip-norm": repr(self.current)}
        )

    @property
    def _key(self) -> str:
        return f"{records.CLIP_NORM}.{self._ledger.dataset}"
