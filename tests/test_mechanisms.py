import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from dpfl_flower import accounting
from dpfl_flower.accounting import Gaussian, Laplace, Relation
from dpfl_flower.mechanisms import GaussianMechanism, LaplaceMechanism
from tests.support.contracts import statistics

HOSTILE = [
    [1e30, -1e30],
    [1e5, 0.0],
    [1e-23, 1e-23],
    [math.nan, 1.0],
    [math.inf, 1.0],
    [1.7e308, 1.7e308],
    [0.0, 0.0],
]
DATA = [[0.5, 0.5], [-1.0, 0.25], [30.0, 40.0]]


# --- calibration ----------------------------------------------------------------------------------


def test_the_gaussian_has_its_golden_noise():
    mechanism = GaussianMechanism(epsilon=1.0, delta=1e-5, clip_norm=7.0)
    assert mechanism.noise_multiplier == pytest.approx(3.7306, abs=5e-5)  # classical: 4.845
    assert mechanism.event == Gaussian(mechanism.noise_multiplier)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
def test_gaussian_noise_is_the_least_that_the_exact_condition_allows(epsilon, delta):
    mechanism = GaussianMechanism(epsilon=epsilon, delta=delta, clip_norm=1.0)
    z = mechanism.noise_multiplier
    assert z == pytest.approx(dp_accounting.get_sigma_gaussian(epsilon, delta), rel=1e-4)

    def spent(z):  # Balle & Wang, Theorem 8, straight
        first = stats.norm.cdf(1 / (2 * z) - epsilon * z)
        return first - math.exp(epsilon) * stats.norm.cdf(-1 / (2 * z) - epsilon * z)

    assert spent(z) <= delta * (1 + 1e-5)
    assert spent(0.999 * z) > delta


@pytest.mark.parametrize("relation", list(Relation))
def test_the_accountant_prices_an_event_at_what_was_asked(relation):
    gaussian = GaussianMechanism(epsilon=2.0, delta=1e-6, clip_norm=3.0, relation=relation)
    spent = accounting.epsilon([gaussian.event], delta=1e-6, relation=relation)
    assert spent == pytest.approx(2.0, rel=1e-6)
    laplace = LaplaceMechanism(epsilon=2.0, clip_norm=3.0, relation=relation)
    spent = accounting.epsilon([laplace.event], delta=1e-9, relation=relation)
    assert 1.99 < spent < 2.03  # the accountant's grid may round up


def test_replace_one_doubles_the_noise():
    for make in (
        lambda relation: GaussianMechanism(
            epsilon=1.0, delta=1e-5, clip_norm=1.0, relation=relation
        ),
        lambda relation: LaplaceMechanism(epsilon=1.0, clip_norm=1.0, relation=relation),
    ):
        one, two = make("add-or-remove-one"), make("replace-one")
        assert two.noise_multiplier == pytest.approx(2 * one.noise_multiplier, rel=1e-12)
        assert make("zero-out").noise_multiplier == one.noise_multiplier
    assert two.event == Laplace(2.0)


# --- sensitivity ----------------------------------------------------------------------------------


def nearly_without_noise(kind, clip_norm):
    if kind is GaussianMechanism:
        return GaussianMechanism(noise_multiplier=0.001, clip_norm=clip_norm), 2
    return LaplaceMechanism(epsilon=1000.0, clip_norm=clip_norm), 1


@pytest.mark.parametrize("kind", [GaussianMechanism, LaplaceMechanism])
@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("clip_norm", [1e-20, 1.0, 1e6])
def test_a_neighbour_moves_the_answer_by_at_most_the_clip_norm(kind, unit, clip_norm):
    mechanism, order = nearly_without_noise(kind, clip_norm)
    data = clip_norm * np.array(DATA)
    answer = mechanism.release(data)
    more = mechanism.release([*data, unit])
    other = mechanism.release([*data[1:], unit])
    noise = 0.05 * clip_norm  # two draws of 0.001 in two coordinates, 20 times over
    assert np.linalg.norm(more - answer, order) <= clip_norm + noise
    assert np.linalg.norm(other - answer, order) <= 2 * clip_norm + noise


@pytest.mark.parametrize("kind", [GaussianMechanism, LaplaceMechanism])
def test_the_answer_is_the_sum_of_the_clipped_units(kind):
    mechanism, order = nearly_without_noise(kind, 2.0)
    clipped = [np.array(u) * min(1, 2.0 / np.linalg.norm(u, order)) for u in DATA]
    np.testing.assert_allclose(mechanism.release(DATA), np.sum(clipped, axis=0), atol=0.06)
    without_nan = mechanism.release([*DATA, [math.nan, 9.0]])
    np.testing.assert_allclose(without_nan, np.sum(clipped, axis=0), atol=0.06)


# --- noise ----------------------------------------------------------------------------------------


def answers(mechanism, dimension=2000, releases=100):
    return np.concatenate([mechanism.release([], dimension=dimension) for _ in range(releases)])


def test_gaussian_noise_has_its_scale_and_3_percent_off_is_rejected():
    mechanism = GaussianMechanism(noise_multiplier=2.5, clip_norm=0.4)
    # The enforced bound exceeds the clip norm by the grid's inflation, and the noise with it.
    statistics.require_scale(answers(mechanism), 2.5 * 0.4, allowance=0.01)


def test_laplace_noise_has_its_scale_and_3_percent_off_is_rejected():
    mechanism = LaplaceMechanism(epsilon=0.8, clip_norm=0.4)
    noise = answers(mechanism) / (0.4 / 0.8)
    # The enforced bound exceeds the clip norm by the grid's inflation, and the noise with it.
    scales = (1, 1.0025, 1.005, 1.0075, 1.01)
    assert any(statistics.laplace_scale_fits(noise, scale) for scale in scales)
    assert not statistics.laplace_scale_fits(noise, 0.97)
    assert not statistics.laplace_scale_fits(noise, 1.04)
    assert statistics.shape_fits(noise, float(noise.std()), "laplace")
    assert not statistics.shape_fits(noise, float(noise.std()), "norm")


def test_every_release_draws_fresh_noise():
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0)
    statistics.require_uncorrelated(
        [mechanism.release([], dimension=20_000) for _ in range(3)],
    )


def test_what_the_sampler_adds_to_delta_is_next_to_nothing():
    gaussian = GaussianMechanism(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    assert 0 < gaussian.sampling_delta(10**6, epsilon=8.0) < 1e-20
    laplace = LaplaceMechanism(epsilon=1.0, clip_norm=1.0)
    assert 0 < laplace.sampling_delta(1000, epsilon=1.0) < 1e-30


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"clip_norm": 0.0, "epsilon": 1.0, "delta": 1e-5}, "clip_norm"),
        ({"clip_norm": 1.0}, "epsilon"),
        ({"clip_norm": 1.0, "epsilon": 1.0}, "delta"),
        ({"clip_norm": 1.0, "delta": 1e-5}, "epsilon"),
        ({"clip_norm": 1.0, "epsilon": -1.0, "delta": 1e-5}, "epsilon"),
        ({"clip_norm": 1.0, "epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"clip_norm": 1.0, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0}, "noise_multiplier"),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}, "noise_multiplier"),
    ],
)
def test_the_gaussian_names_a_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=f"{named}="):
        GaussianMechanism(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"clip_norm": -1.0, "epsilon": 1.0}, "clip_norm"),
        ({"clip_norm": 1.0, "epsilon": 0.0}, "epsilon"),
        ({"clip_norm": 1.0, "epsilon": math.inf}, "epsilon"),
    ],
)
def test_the_laplace_names_a_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=f"{named}="):
        LaplaceMechanism(**arguments)


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="swap"):
        LaplaceMechanism(epsilon=1.0, clip_norm=1.0, relation="swap")


def test_without_units_the_dimension_must_be_told_and_noise_is_released_all_the_same():
    mechanism = LaplaceMechanism(epsilon=1.0, clip_norm=1.0)
    with pytest.raises(ValueError, match="dimension=None"):
        mechanism.release([])
    assert mechanism.release([], dimension=5).all()
    assert mechanism.release([3, 4]).shape == (1,)  # plain numbers are vectors of one


def test_units_of_different_lengths_are_refused():
    mechanism = LaplaceMechanism(epsilon=1.0, clip_norm=1.0)
    with pytest.raises(ValueError, match="must be 2"):
        mechanism.release([[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="must be 3"):
        mechanism.release([[1.0, 2.0]], dimension=3)
