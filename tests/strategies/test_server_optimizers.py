import numpy as np
import pytest

from dpfl_strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi


def run(optimizer, updates):
    model, state = np.zeros(len(updates[0])), {}
    for update in updates:
        model, state = optimizer.step(model, np.asarray(update, float), state)
    return model, state


UPDATES = [[1.0, -0.5, 0.0], [0.25, 2.0, 0.0], [-1.0, 0.1, 1e-3]]


def test_fedavg_moves_by_the_mean():
    model, state = run(FedAvg(lr=0.5), UPDATES)
    np.testing.assert_allclose(model, 0.5 * np.sum(UPDATES, axis=0))
    assert not state


def test_momentum_follows_its_recursion():
    velocity, model = np.zeros(3), np.zeros(3)
    for update in UPDATES:
        velocity = 0.9 * velocity + np.asarray(update)
        model = model + 0.3 * velocity
    np.testing.assert_allclose(run(FedAvgM(lr=0.3, momentum=0.9), UPDATES)[0], model)


@pytest.mark.parametrize(
    ("optimizer", "second_moment"),
    [
        (FedAdagrad(lr=0.1, beta1=0.5, tau=0.01), lambda v, g: v + g),
        (FedAdam(lr=0.1, beta1=0.5, tau=0.01, beta2=0.7), lambda v, g: 0.7 * v + 0.3 * g),
        (
            FedYogi(lr=0.1, beta1=0.5, tau=0.01, beta2=0.7),
            lambda v, g: v - 0.3 * g * np.sign(v - g),
        ),
    ],
)
def test_adaptive_optimizers_follow_algorithm_2_of_reddi_et_al(optimizer, second_moment):
    model, m, v = np.zeros(3), np.zeros(3), np.full(3, 0.01**2)
    for update in UPDATES:
        delta = np.asarray(update)
        m = 0.5 * m + 0.5 * delta
        v = second_moment(v, delta**2)
        model = model + 0.1 * m / (np.sqrt(v) + 0.01)
    np.testing.assert_allclose(run(optimizer, UPDATES)[0], model)


def test_step_is_pure_so_that_a_checkpoint_holds_all_of_it():
    optimizer = FedAdam()
    model, state = run(optimizer, UPDATES)
    kept = {name: value.copy() for name, value in state.items()}
    again, _ = optimizer.step(model, np.ones(3), kept)
    np.testing.assert_array_equal(optimizer.step(model, np.ones(3), state)[0], again)
    np.testing.assert_array_equal(state["first_moment"], kept["first_moment"])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: FedAvg(lr=0),
        lambda: FedAvgM(momentum=1.0),
        lambda: FedAdam(beta1=1.0),
        lambda: FedAdam(beta2=0.0),
        lambda: FedYogi(beta2=1.0),
        lambda: FedAdagrad(tau=-1.0),
        lambda: FedAvgM(lr=float("nan")),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"(lr|momentum|beta1|beta2|tau)="):
        bad()
