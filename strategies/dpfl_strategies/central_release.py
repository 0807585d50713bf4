"""The one place where a server turns bounded contributions into a noisy mean (central trust).

Order, as everywhere: the sum is exact and in integers; the ledger is charged and synced; the noise
is drawn and added in integers; one conversion to float comes last. Adding an integer drawn from the
rounded Gaussian to an integer sum equals rounding the sum plus a real Gaussian, so the Gaussian
event that the ledger prices covers it by post-processing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import Ledger, LedgerPosition
from dpfl_flower.noise import RoundedGaussian
from dpfl_flower.quantize import IntegerGrid
from dpfl_flower.rng import RandomSource
from dpfl_strategies.signal_to_noise import signal_to_noise


@dataclass(frozen=True)
class NoisyMean:
    """One released round.

    Attributes
    ----------
    update:
        The noisy mean update, float64, shape ``(d,)``.
    fraction_within_clip:
        The noisy fraction of the expected cohort whose update was within the clip norm (b~ in
        Andrew et al., arXiv 1905.03871); None without adaptive clipping.
    position:
        The ledger after the charge for this release.
    noise_stddev:
        Standard deviation of the noise on each entry of ``update``, a public constant.
    metric_places:
        The noisy mean place of each bounded metric in its range, float64, shape ``(m,)``: within
        [-1, 1] but for the noise. Empty without metrics.
    """

    update: NDArray[np.float64]
    fraction_within_clip: float | None
    position: LedgerPosition
    noise_stddev: float
    metric_places: NDArray[np.float64]

    @property
    def signal_to_noise(self) -> float:
        """The mean's power over that of its noise, estimated from ``update``."""
        return signal_to_noise(self.update, noise_stddev=self.noise_stddev)


class CentralRelease:
    """Releases one noisy mean a round, charging the ledger first.

    Parameters
    ----------
    grid:
        The integers, with the bound that every unit obeys; the noise is scaled to it.
    ledger, run:
        Where each release is charged. The plan of ``run`` must already be in the ledger, with a
        noise multiplier of at most ``grid.noise_multiplier``: what is charged is never less noisy
        than what is released.
    rng:
        The source of the noise.
    expected_cohort, mean_weight:
        Public constants; their product divides the sum.
    """

    def __init__(
        self,
        grid: IntegerGrid,
        *,
        ledger: Ledger,
        run: str,
        rng: RandomSource,
        expected_cohort: float,
        mean_weight: float,
    ) -> None:
        self._grid = grid
        self._ledger = ledger
        self._run = run
        self._rng = rng
        self._cohort = expected_cohort
        self._divisor = expected_cohort * mean_weight
        self._noise = RoundedGaussian(grid.noise_units) if grid.noise_units else None

    def release(
        self, total: NDArray[np.int64], *, clip_norm: float, server_round: int
    ) -> NoisyMean:
        """Charge the ledger, then return the noisy mean; an empty sum is released as any other.

        Parameters
        ----------
        total:
            The exact sum of contributions on the grid, shape ``(grid.width,)``; left as it is.
        clip_norm:
            The clip norm that bounded the contributions.
        server_round:
            Noted in the ledger.

        Raises
        ------
        BudgetExhausted
            If the budget does not allow it; nothing is charged and nothing released.
        """
        position = self._ledger.charge(self._run, note={"round": server_round})
        noisy = total.copy()
        if self._noise is not None:
            noisy += self._noise.sample(noisy.size, self._rng)
        dimension = self._grid.dimension
        per_unit = np.float64(self._grid.unit_size(clip_norm) / self._divisor)
        update: NDArray[np.float64] = noisy[:dimension].astype(np.float64) * per_unit
        fraction = None
        if self._grid.indicator_units:
            # The sum holds +K or -K for each unit, so half of sum / K is the sum of (b - 1/2).
            votes = float(noisy[dimension]) / (2 * self._grid.indicator_units)
            fraction = votes / self._cohort + 0.5
        return NoisyMean(
            update=update,
            fraction_within_clip=fraction,
            position=position,
            noise_stddev=float(self._grid.noise_units * per_unit),
            metric_places=self._grid.mean_places(noisy, self._cohort),
        )
