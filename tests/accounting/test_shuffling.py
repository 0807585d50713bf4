import math

import numpy as np
import pytest
from scipy import stats

from dpfl_flower.accounting import shuffled_epsilon


def true_delta(epsilon0, reports, epsilon):
    """Shuffled binary randomised response: exactly how far one reply of 1 shows among zeros."""
    truth = math.exp(epsilon0) / (1 + math.exp(epsilon0))
    others = stats.binom.pmf(np.arange(reports + 1), reports - 1, 1 - truth)
    shifted = np.concatenate([[0.0], others[:-1]])
    one, zero = (p * shifted + (1 - p) * others for p in (truth, 1 - truth))
    return max(
        np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((one, zero), (zero, one))
    )


@pytest.mark.parametrize("epsilon0", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reports", [2_000, 20_000])
def test_it_bounds_what_shuffling_really_hides(epsilon0, reports):
    delta = 1e-6
    stated = shuffled_epsilon(epsilon0, reports=reports, delta=delta)
    assert stated < epsilon0
    assert true_delta(epsilon0, reports, stated) <= delta
    # And not more than ten times as much: a tenth of it would be wrong.
    assert true_delta(epsilon0, reports, stated / 10) > delta


def test_where_the_theorem_does_not_hold_the_local_epsilon_stays():
    assert shuffled_epsilon(5.0, reports=1000, delta=1e-6) == 5.0
    assert shuffled_epsilon(5.0, reports=1000, delta=1e-6, rounds=3) == 15.0
    assert shuffled_epsilon(0.1, reports=1, delta=1e-6) == 0.1


def test_rounds_share_delta_and_add_up():
    once = shuffled_epsilon(1.0, reports=10**6, delta=1e-7)
    assert shuffled_epsilon(1.0, reports=10**6, delta=1e-6, rounds=10) == pytest.approx(10 * once)


@pytest.mark.parametrize(
    ("name", "value"),
    [("local_epsilon", 0.0), ("reports", 0), ("delta", 0.0), ("delta", 1.0), ("rounds", 0)],
)
def test_impossible_arguments_are_refused(name, value):
    arguments = {"local_epsilon": 1.0, "reports": 100, "delta": 1e-6, "rounds": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}="):
        shuffled_epsilon(arguments.pop("local_epsilon"), **arguments)
