"""DP-FedAvg: swap Flower's FedAvg for it and the run is private, the ClientApp unchanged."""

import numpy as np
from numpy.typing import NDArray

from dpfl_strategies.private_strategy import PrivateStrategy


class DPFedAvg(PrivateStrategy):
    """DP-FedAvg (McMahan et al., arXiv 1710.06963).

    Nodes return weights, as for Flower's ``FedAvg``. The server clips each node's update, sums
    them in integers, adds noise scaled to the clip, divides by the *expected* cohort, and lets the
    server optimizer step. The guarantee holds against whoever sees the released models; the server
    itself sees every update, or with ``secure_aggregation`` their exact sum. Its parameters are
    those of :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.

    Examples
    --------
    >>> from dpfl_flower import FixedClipping, PoissonSampling, PrivacyBudget
    >>> strategy = DPFedAvg(
    ...     budget=PrivacyBudget(epsilon=8.0, delta=1e-5, unit="node"),
    ...     sampling=PoissonSampling(expected_cohort=100, population=1000),
    ...     clipping=FixedClipping(0.5),
    ... )
    """

    weighs_by_weighting = True

    def weigh(self, num_examples: float) -> float:
        """Return the weight that ``weighting`` gives."""
        return self.weighting.weigh(num_examples)

    def apply_noisy_mean(
        self, model: NDArray[np.float64], mean_update: NDArray[np.float64], server_round: int
    ) -> NDArray[np.float64]:
        """Let the server optimizer step."""
        model, self.optimizer_state = self.server_optimizer.step(
            model, mean_update, self.optimizer_state
        )
        return model
