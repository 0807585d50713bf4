"""One unit's update of the forecaster: what it is, what it depends on, and how well it serves."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apps.smart_city.smart_city as package
from apps.smart_city.smart_city.counts import FILE, HourlyCounts, read_counts
from apps.smart_city.smart_city.data import FORTNIGHTS, HOURS, ROWS, SensorFortnight
from apps.smart_city.smart_city.features import FEATURES, Rows, rows_of
from apps.smart_city.smart_city.reference import Reference
from apps.smart_city.smart_city.task import (
    STEP,
    AbsoluteErrors,
    LocalTraining,
    Settings,
    evaluate,
    forecast,
    local_update,
    loss,
    new_model,
    tensors,
)
from dpfl_flower.datasets import fetch

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def unit_of(seed: int, hours: int = HOURS) -> SensorFortnight:
    random = np.random.default_rng(seed)
    day = 100 + 90 * np.sin(2 * np.pi * np.arange(hours) / 24)
    return SensorFortnight("Quay", 0, rows_of(random.poisson(day).astype(float), 0))


def arrays_of(seed: int) -> Arrays:
    return {name: value.numpy().copy() for name, value in new_model(seed=seed).state_dict().items()}


ONE_STEP = LocalTraining(learning_rate=1.0, epochs=1)


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_update_is_what_plain_gradient_descent_on_all_rows_would_move(epochs: int) -> None:
    training = LocalTraining(learning_rate=0.3, epochs=epochs)
    unit = unit_of(1)
    assert len(unit.rows) <= training.batch_size == ROWS
    model = new_model(seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = training.optimizer(model.parameters())
    inputs, targets = tensors(unit.rows)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(model(inputs), targets).mean().backward()
        optimizer.step()
    update = local_update(arrays_of(2), unit, training=training)
    assert list(update) == list(before)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(update[name], value - before[name], atol=1e-6)
        assert update[name].dtype == np.float32


def test_the_order_of_rows_plays_no_part() -> None:
    rows = unit_of(1).rows
    back = Rows(rows.features[::-1].copy(), rows.naive[::-1], rows.counts[::-1], rows.hours[::-1])
    one = local_update(arrays_of(1), unit_of(1), training=ONE_STEP)
    other = local_update(arrays_of(1), SensorFortnight("Quay", 0, back), training=ONE_STEP)
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], atol=1e-6)


def test_a_unit_without_rows_moves_nothing() -> None:
    update = local_update(arrays_of(1), unit_of(1, hours=10), training=ONE_STEP)
    assert {name: value.shape for name, value in update.items()} == {
        name: value.shape for name, value in arrays_of(1).items()
    }
    assert not any(value.any() for value in update.values())


def test_an_update_leaves_the_model_and_torchs_generator_as_they_were() -> None:
    arrays = arrays_of(1)
    state = torch.random.get_rng_state()
    local_update(arrays, unit_of(1), training=LocalTraining(learning_rate=1.0, epochs=2))
    for name, value in arrays_of(1).items():
        np.testing.assert_array_equal(arrays[name], value)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_makes_a_unit_easier_to_forecast() -> None:
    unit, arrays = unit_of(1), arrays_of(1)
    moves = local_update(arrays, unit, training=LocalTraining(learning_rate=0.05, epochs=50))
    after = {name: arrays[name] + moves[name] for name in arrays}
    before_mae, after_mae = (evaluate(model, [unit.rows]).mae for model in (arrays, after))
    assert before_mae is not None
    assert after_mae is not None
    assert after_mae < before_mae


def test_the_model_is_an_mlp_64_32_on_22_features() -> None:
    shapes = [value.shape for value in arrays_of(0).values()]
    assert shapes == [(64, 22), (64,), (32, 64), (32,), (1, 32), (1,)]
    assert len(FEATURES) == 22


def test_the_first_model_follows_its_seed_and_starts_near_the_naive_forecast() -> None:
    one, same, other = arrays_of(1), arrays_of(1), arrays_of(2)
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["0.weight"] != other["0.weight"]).any()
    rows = unit_of(3).rows
    moves = np.log1p(forecast(one, rows)) - rows.naive
    assert np.abs(moves).max() < STEP / 2


def test_a_loss_is_one_number_a_row_and_counts_busy_hours_more() -> None:
    targets = torch.tensor([[1.0, 1.0], [1.0, 4.0], [-2.0, 4.0]])
    outputs = torch.tensor([[2.0], [2.0], [-2.0]])
    found = loss(outputs, targets)
    assert found.shape == (3,)
    assert found.tolist() == pytest.approx([5 / 6, 4 * 5 / 6, 0.0])
    stacked = loss(outputs.expand(2, 3, 1), targets.expand(2, 3, 2))
    assert stacked.shape == (2, 3)


def test_the_weight_of_an_hour_is_made_of_what_was_known_before_it() -> None:
    rows = unit_of(1).rows
    other = Rows(rows.features, rows.naive, rows.counts + 50, rows.hours)
    torch.testing.assert_close(tensors(rows)[1][:, 1], tensors(other)[1][:, 1])
    assert (tensors(rows)[1][:, 0] < tensors(other)[1][:, 0]).all()


def test_fewer_than_no_pedestrians_are_never_forecast() -> None:
    rows = unit_of(1).rows
    arrays = arrays_of(1)
    arrays["4.bias"] = np.array([-1e3], np.float32)
    assert (forecast(arrays, rows) == 0).all()
    assert evaluate(arrays, [rows, rows]).mae == pytest.approx(rows.counts.mean())
    assert AbsoluteErrors().mae is None


def config() -> dict[str, Any]:
    path = Path(package.__file__).parents[1] / "pyproject.toml"
    return dict(tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"])


def test_the_apps_own_configuration_is_the_published_recipe() -> None:
    settings = Settings.parse(config())
    assert settings.num_units == 21 * FORTNIGHTS
    assert settings.expected_cohort == settings.num_units / 10
    assert settings.target_delta == 1e-5
    assert settings.training == ONE_STEP


@pytest.mark.parametrize("key", sorted(config()))
def test_a_missing_setting_is_named(key: str) -> None:
    short = {name: value for name, value in config().items() if name != key}
    with pytest.raises(ValueError, match=f"run config {key}=None must be of type"):
        Settings.parse(short)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("num-units", 546.0, "num-units=546.0 must be of type int"),
        ("expected-cohort", 547, "expected_cohort=547"),
        ("num-server-rounds", 0, "num_server_rounds|num_rounds=0"),
        ("local-learning-rate", 0, "local_learning_rate=0"),
        ("local-epochs", 1.5, "local-epochs=1.5 must be of type int"),
        ("server-beta2", 1.0, "server_beta2=1.0"),
        ("target-delta", 0, "target_delta=0"),
        ("init-seed", -1, "init_seed=-1"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: float, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings.parse({**config(), key: value})


@pytest.fixture(scope="module")
def auckland() -> HourlyCounts:
    return read_counts(fetch("akl-pedestrians") / FILE)


def test_what_can_be_had_without_privacy_is_what_the_readme_says(auckland: HourlyCounts) -> None:
    reference = Reference.of(auckland)
    assert reference.last_hour == pytest.approx(76.4, abs=0.3)
    assert reference.last_week == pytest.approx(59.6, abs=0.3)
    assert reference.naive == pytest.approx(41.86, abs=0.05)
    assert 34.0 < reference.pooled < 36.0


def test_without_hours_there_is_no_reference(auckland: HourlyCounts) -> None:
    early = HourlyCounts(auckland.first_hour, auckland.sensors, auckland.counts[:100])
    with pytest.raises(ValueError, match="no hour can be forecast"):
        Reference.of(early)
