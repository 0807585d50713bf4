"""One user's update of the film biases: what it is, what it depends on, and how well it serves."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apps.recommender.recommender as package
from apps.recommender.recommender.catalogue import FILE as CATALOGUE_FILE
from apps.recommender.recommender.catalogue import Catalogue, Film, read_catalogue
from apps.recommender.recommender.data import FILE as RATINGS_FILE
from apps.recommender.recommender.data import Split, UserRatings, read_ratings
from apps.recommender.recommender.reference import Reference
from apps.recommender.recommender.task import (
    BIAS,
    Settings,
    SquaredErrors,
    evaluate,
    local_update,
    new_model,
    recommend,
)
from apps.recommender.recommender.taste import MIDDLE, Taste
from dpfl_flower.datasets import fetch

CATALOGUE = Catalogue(
    tuple(
        Film(str(number), f"Film {number}", 1990 + number % 9, ("Drama", "War")[: number % 3])
        for number in range(30)
    )
)
PENALTY = np.array([5.0, 20.0, 20.0, 30.0, 5.0])


def user_of(seed: int, count: int = 12) -> UserRatings:
    random = np.random.default_rng(seed)
    places = np.sort(random.choice(len(CATALOGUE), count, replace=False))
    stars = random.integers(1, 6, count).astype(float)
    return UserRatings(str(seed), places, stars, CATALOGUE.traits[places])


def biases(seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(0, 0.5, len(CATALOGUE))


def objective(
    user: UserRatings,
    bias: np.ndarray[Any, np.dtype[np.float64]],
    weights: np.ndarray[Any, np.dtype[np.float64]],
) -> float:
    """Half the squared errors and half the penalty, written out on its own."""
    own = bias[user.places]
    design = np.column_stack([np.ones(len(user)), user.traits, own])
    errors = user.stars - (3.5 + own + design @ weights)
    return float((errors**2).sum() + (PENALTY * weights**2).sum()) / 2


def test_no_other_taste_fits_a_user_better() -> None:
    user, bias = user_of(1), biases(2)
    weights = Taste.of(user, bias).weights
    best = objective(user, bias, weights)
    random = np.random.default_rng(3)
    for _ in range(50):
        assert objective(user, bias, weights + random.normal(0, 0.01, weights.shape)) > best


def test_an_update_is_the_negative_gradient_of_what_the_user_cannot_explain() -> None:
    user, bias = user_of(1), biases(2)
    update = local_update({BIAS: bias.astype(np.float32)}, user)[BIAS]

    def left(moved: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        return objective(user, moved, Taste.of(user, moved).weights)

    step = 1e-4
    slopes = [
        (left(bias + step * unit) - left(bias - step * unit)) / (2 * step)
        for unit in np.eye(len(bias))
    ]
    np.testing.assert_allclose(update, -np.array(slopes), atol=1e-4)


def test_an_update_is_dense_over_the_catalogue_and_zero_where_nothing_was_rated() -> None:
    user = user_of(1)
    update = local_update(new_model(CATALOGUE), user)[BIAS]
    assert update.shape == (len(CATALOGUE),)
    assert update.dtype == np.float32
    assert set(np.flatnonzero(update)) == set(user.places)


def test_a_user_without_ratings_moves_nothing() -> None:
    nobody = user_of(1).where(np.zeros(12, bool))
    assert not local_update({BIAS: biases(1).astype(np.float32)}, nobody)[BIAS].any()
    assert not Taste.of(nobody, biases(1)).weights.any()


def test_an_update_leaves_the_model_as_it_was() -> None:
    model = {BIAS: biases(1).astype(np.float32)}
    before = model[BIAS].copy()
    local_update(model, user_of(1))
    np.testing.assert_array_equal(model[BIAS], before)


def test_training_starts_where_no_film_is_better_than_another() -> None:
    assert new_model(CATALOGUE)[BIAS].tolist() == [0.0] * 30


def test_recommendations_are_films_not_yet_rated_and_the_best_first() -> None:
    user, model = user_of(1), {BIAS: biases(5).astype(np.float32)}
    found = recommend(model, user, CATALOGUE)
    assert len(found) == 10
    stars = [one.stars for one in found]
    assert stars == sorted(stars, reverse=True)
    assert max(stars) <= 5
    places = {CATALOGUE.places[one.film.id] for one in found}
    assert not places & set(user.places)
    taste = Taste.of(user, model[BIAS])
    others = [p for p in range(30) if p not in places and p not in user.places]
    assert min(stars) >= taste.expected(CATALOGUE.traits[others], model[BIAS][others]).max() - 1e-9


def test_no_more_films_are_recommended_than_there_are() -> None:
    assert len(recommend(new_model(CATALOGUE), user_of(1, 27), CATALOGUE)) == 3
    assert recommend(new_model(CATALOGUE), user_of(1, 30), CATALOGUE) == ()
    with pytest.raises(ValueError, match="count=0"):
        recommend(new_model(CATALOGUE), user_of(1), CATALOGUE, count=0)


def test_errors_add_up_over_users_and_forecasts_stay_in_the_scale() -> None:
    high = {BIAS: np.full(30, 9.0, np.float32)}
    film = np.array([0])
    user = UserRatings("u", film, np.array([4.0]), CATALOGUE.traits[film])
    nothing = user.where(np.array([False]))
    errors = evaluate(high, [Split(training=nothing, held_out=user)] * 2)
    assert errors == SquaredErrors(2.0, 2)  # 5 stars twice, where 4 were given
    assert errors.rmse == 1.0
    assert SquaredErrors().rmse is None


def config() -> dict[str, Any]:
    path = Path(package.__file__).parents[1] / "pyproject.toml"
    return dict(tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"])


def test_the_apps_own_configuration_is_the_published_recipe() -> None:
    settings = Settings.parse(config())
    assert settings.num_users == 943
    assert settings.target_delta == 1e-5


@pytest.mark.parametrize("key", sorted(config()))
def test_a_missing_setting_is_named(key: str) -> None:
    short = {name: value for name, value in config().items() if name != key}
    with pytest.raises(ValueError, match=f"run config {key}=None must be of type"):
        Settings.parse(short)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("num-users", 943.0, "num-users=943.0 must be of type int"),
        ("num-users", 0, "num_users=0"),
        ("num-server-rounds", True, "num-server-rounds=True must be of type int"),
        ("clip-norm", 0, "clip_norm=0"),
        ("server-learning-rate", -1.0, "server_learning_rate=-1.0"),
        ("target-epsilon", float("inf"), "target_epsilon=inf"),
        ("target-delta", 1, "target_delta=1"),
        ("split-seed", -1, "split_seed=-1"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: float, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings.parse({**config(), key: value})


def test_what_can_be_had_without_privacy_is_what_the_readme_says() -> None:
    folder = fetch("ml-100k")
    catalogue = read_catalogue(folder / CATALOGUE_FILE)
    users = read_ratings(folder / RATINGS_FILE, catalogue)
    splits = [Split.of(user, catalogue, seed=1) for user in users]
    reference = Reference.of(splits, catalogue)
    assert 0.930 < reference.two_biases < 0.950
    assert 0.905 < reference.together < 0.925
    assert 0.985 < reference.alone < 1.010


def test_without_held_out_ratings_there_is_no_reference() -> None:
    user = user_of(1)
    empty = Split(training=user, held_out=user.where(np.zeros(12, bool)))
    with pytest.raises(ValueError, match="no rating is held out"):
        Reference.of([empty], CATALOGUE)


def test_the_middle_is_a_public_constant() -> None:
    assert MIDDLE == 3.5
