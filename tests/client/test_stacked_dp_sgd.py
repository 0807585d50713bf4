"""Many small models at once: each as private, and as trained, as one alone."""

import logging
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower.accounting import Ledger
from dpfl_flower.client import (
    NODE_LOGGER,
    DPSGDClient,
    DPSGDConfig,
    ModelRefused,
    NodeErrorCode,
    NodeLedger,
    NodePolicy,
    StackedDPSGD,
)
from dpfl_flower.client.sum_grid import SumGrid
from dpfl_flower.clipping import AdaptiveClipping
from dpfl_flower.rng import SeededRandom
from tests.support.node import context

MSE = nn.MSELoss(reduction="none")
EXAMPLE = (torch.zeros(3), torch.tensor(0.0))


def configured(**changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 1,
        "planned_rounds": 100,
        "clip_norm": 1.0,
        "expected_batch_size": 4.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
    }
    return DPSGDConfig(**{**settings, **changes})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def column(outputs, targets):
    return MSE(outputs[:, 0], targets)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def regression(n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 3, generator=generator), torch.randn(n, generator=generator)
    )


def names(count):
    return [NodeLedger(f"ward-{index}") for index in range(count)]


def stack_of(models, datasets, config, *, ledgers=None, **arguments):
    settings = {"loss_fn": column, "optimizer": sgd, "example": EXAMPLE, "device": "cpu"}
    return StackedDPSGD(
        models,
        datasets,
        config=config,
        ledgers=ledgers or names(len(models)),
        **{**settings, **arguments},
    )


def numbers(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# The training.


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SGD(
            [{"params": [one], "lr": 0.1 / (1 + place)} for place, one in enumerate(p)]
        ),
    ],
    ids=["momentum", "adam", "adagrad", "groups"],
)
def test_without_noise_each_model_is_trained_as_by_a_client_of_its_own(optimizer):
    config = configured(noise_multiplier=0.0, steps_per_round=5, clip_norm=0.7)
    torch.manual_seed(0)
    models, sizes = [mlp() for _ in range(4)], (0, 1, 7, 40)  # 40 take several passes
    datasets = [regression(n, seed=n) for n in sizes]
    alone = [mlp() for _ in models]
    for one, model in zip(alone, models, strict=True):
        one.load_state_dict(model.state_dict())
    stack = stack_of(models, datasets, config, optimizer=optimizer)
    assert stack.stacked
    for _ in range(2):
        assert all(outcome.trained for outcome in stack.train())
    for one, model, dataset in zip(alone, models, datasets, strict=True):
        client = DPSGDClient(
            one,
            dataset,
            config=config,
            loss_fn=column,
            optimizer=optimizer,
            ledger=NodeLedger("x"),
            example=EXAMPLE,
            device="cpu",
        )
        for _ in range(2):
            client.fit(client.get_parameters({}), {})
        torch.testing.assert_close(numbers(model), numbers(one), rtol=1e-4, atol=1e-5)


def conv():
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("build", "changes", "says"),
    [
        (conv, {}, "no stacked Unflatten"),
        (mlp, {"clip_style": "per-layer"}, "per layer"),
        (mlp, {"mixed_precision": True}, "precision is mixed"),
        (mlp, {"adaptive_clipping": AdaptiveClipping(initial=1.0)}, "adaptive"),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_at_a_time_and_the_log_says_so(
    build, changes, says, caplog
):
    models, datasets = [build() for _ in range(2)], [regression(5), regression(7)]
    before = [numbers(model) for model in models]
    with caplog.at_level(logging.INFO, logger=NODE_LOGGER):
        stack = stack_of(models, datasets, configured(**changes))
    lines = [r for r in caplog.messages if r.startswith("Training one model at a time")]
    assert len(lines) == 1 and says in lines[0]
    assert not stack.stacked
    outcomes = stack.train()
    assert [outcome.claim["dataset"] for outcome in outcomes] == ["ward-0", "ward-1"]
    assert all(not torch.equal(a, numbers(b)) for a, b in zip(before, models, strict=True))


def test_a_loss_that_does_not_run_on_padding_is_taken_one_model_at_a_time():
    def picky(outputs, targets):
        if bool((targets == 0).any()):
            raise ValueError("a target of 0")
        return column(outputs, targets)

    stack = stack_of([mlp(), mlp()], [regression(5), regression(7)], configured(), loss_fn=picky)
    assert not stack.stacked
    assert all(outcome.trained for outcome in stack.train())


# The coins and the noise.


class Watches(Dataset):
    """Counts how often each record is read."""

    def __init__(self, n):
        self.reads = np.zeros(n, dtype=int)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return torch.zeros(3), torch.tensor(0.0)


def reseed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_every_record_of_every_model_has_its_own_coin_which_no_seed_moves():
    n, steps = 400, 40
    data = [Watches(n) for _ in range(3)]
    config = configured(sampling_rate=0.3, steps_per_round=steps, expected_batch_size=100)
    stack = stack_of([mlp() for _ in data], data, config)
    counts = []
    for _ in range(2):
        reseed()
        before = [one.reads.copy() for one in data]
        stack.train()
        counts += [one.reads - was for one, was in zip(data, before, strict=True)]
    spread = math.sqrt(steps * n * 0.3 * 0.7)
    for one in counts:
        assert abs(one.sum() - 0.3 * steps * n) < 6 * spread
    correlations = np.corrcoef(counts)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(n)


D = 100_000
WIDE = (torch.zeros(D), torch.tensor(0.0))


def zeros(n):
    """Records whose gradients are zeros."""
    return TensorDataset(torch.zeros(n, D), torch.ones(n))


def right_scale(noise, stddev):
    """Accept a standard deviation within 1.34 %: six times the error of estimating it from D."""
    return abs(noise.std() / stddev - 1) < 6 / math.sqrt(2 * D) and abs(
        noise.mean()
    ) < 6 * stddev / math.sqrt(D)


@pytest.mark.parametrize("n_records", [0, 3])
def test_each_models_noise_is_full_sized_and_independent_of_the_others(n_records):
    """A scale 3 % off is 13 standard errors away: missed with a probability below 1e-11."""
    data = [zeros(n_records) for _ in range(3)]
    config = configured(noise_multiplier=1.5, clip_norm=2.0)
    noises = []
    for _ in range(2):
        models = [nn.Sequential(nn.Linear(D, 1, bias=False)) for _ in data]
        before = [numbers(model).double() for model in models]
        reseed()
        stack = stack_of(models, data, config, example=WIDE)
        assert stack.stacked
        reseed()
        stack.train()
        noises += [(numbers(m).double() - b).numpy() for m, b in zip(models, before, strict=True)]
    for noise in noises:
        assert right_scale(noise, 1.5 * 2.0 / 4.0)
        assert not right_scale(noise, 1.03 * 1.5 * 2.0 / 4.0)
        assert not right_scale(noise, 0.97 * 1.5 * 2.0 / 4.0)
    correlations = np.corrcoef(noises)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(D)
    shifted = [np.corrcoef(noise[:-1], noise[1:])[0, 1] for noise in noises]
    assert np.abs(shifted).max() < 6 / math.sqrt(D)


def test_every_step_draws_noise_of_its_own():
    model = nn.Sequential(nn.Linear(D, 1, bias=False))
    before = numbers(model).double()
    stack = stack_of([model], [zeros(0)], configured(steps_per_round=4), example=WIDE)
    assert stack.stacked
    stack.train()
    noise = (numbers(model).double() - before).numpy()
    assert right_scale(noise, 2 * 1.0 / 4.0)


def test_the_noisy_sum_leaves_on_a_public_grid():
    """Undivided and in float64, so that every bit of a sum can be seen."""
    models = [nn.Sequential(nn.Linear(3, 1)).double() for _ in range(2)]
    for model in models:
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    data = [TensorDataset(*(t.double() for t in regression(9, seed=i).tensors)) for i in range(2)]
    example = tuple(part.double() for part in EXAMPLE)
    config = configured(noise_multiplier=1.3, clip_norm=0.7, expected_batch_size=1.0)
    stack = stack_of(models, data, config, example=example)
    assert stack.stacked
    stack.train()
    grid = 0.7 / SumGrid.for_noise_multiplier(1.3, 4).clip_units
    for model in models:
        cells = numbers(model) / grid
        assert float(cells.abs().max()) > 1
        assert bool(((cells - cells.round()).abs() <= 2.0**-50 * cells.abs()).all())


# The ledgers.


def test_each_data_set_is_charged_what_a_client_of_its_own_would_be(tmp_path):
    config = configured(sampling_rate=0.2, steps_per_round=3, noise_multiplier=0.8)
    ledgers = [NodeLedger(f"w{i}", path=tmp_path / f"{i}.jsonl") for i in range(3)]
    stack = stack_of([mlp() for _ in ledgers], [regression(9)] * 3, config, ledgers=ledgers)
    for _ in range(2):
        outcomes = stack.train()
    client = DPSGDClient(
        mlp(),
        regression(9),
        config=config,
        loss_fn=column,
        optimizer=sgd,
        ledger=NodeLedger("alone", path=tmp_path / "alone.jsonl"),
        device="cpu",
    )
    for _ in range(2):
        client.fit(client.get_parameters({}), {})
    alone = client.privacy_claim()
    for outcome, ledger in zip(outcomes, ledgers, strict=True):
        assert outcome.claim["dataset"] == ledger.dataset
        for field in ("epsilon", "delta", "unit", "relation", "durable", "events"):
            assert outcome.claim[field] == alone[field]
        with Ledger.open(ledger.path, dataset=ledger.dataset, delta=1e-5, unit="example") as opened:
            assert opened.releases == 6


def test_a_data_set_whose_budget_is_spent_is_left_out_and_the_others_go_on(tmp_path):
    config = configured(noise_multiplier=None, target_epsilon=2.0, planned_rounds=2)
    ledgers = [NodeLedger(f"w{i}", path=tmp_path / f"{i}.jsonl") for i in range(3)]
    earlier = DPSGDClient(
        mlp(),
        regression(9),
        config=config,
        loss_fn=column,
        optimizer=sgd,
        ledger=NodeLedger("w1", path=tmp_path / "1.jsonl", run="earlier"),
        device="cpu",
    )
    for _ in range(2):
        earlier.fit(earlier.get_parameters({}), {})
    models = [mlp() for _ in ledgers]
    before = [numbers(model) for model in models]
    outcomes = stack_of(models, [regression(9)] * 3, config, ledgers=ledgers).train()
    assert [outcome.trained for outcome in outcomes] == [True, False, True]
    assert outcomes[1].refused.code is NodeErrorCode.BUDGET_EXHAUSTED
    assert outcomes[1].claim is None
    same = [torch.equal(a, numbers(b)) for a, b in zip(before, models, strict=True)]
    assert same == [False, True, False]


def test_the_nodes_policy_holds_for_each_data_set():
    models = [mlp(), mlp()]
    before = [numbers(model) for model in models]
    policy = NodePolicy(min_noise_multiplier=1.1)
    outcomes = stack_of(models, [regression(9)] * 2, configured(), policy=policy).train()
    assert {outcome.refused.code for outcome in outcomes} == {NodeErrorCode.POLICY_REFUSED}
    assert all(torch.equal(a, numbers(b)) for a, b in zip(before, models, strict=True))


def test_each_ledger_brings_the_policy_of_the_nodes_config():
    models = [mlp(), mlp()]
    ledgers = [
        NodeLedger.from_context(context(min_noise_multiplier=least), dataset=f"w{least}")
        for least in (0.9, 1.1)
    ]
    outcomes = stack_of(models, [regression(9)] * 2, configured(), ledgers=ledgers).train()
    assert [outcome.trained for outcome in outcomes] == [True, False]
    assert outcomes[1].refused.code is NodeErrorCode.POLICY_REFUSED


def test_all_are_charged_before_the_first_is_trained_and_stay_charged_if_it_fails(tmp_path):
    ledgers = [NodeLedger(f"w{i}", path=tmp_path / f"{i}.jsonl") for i in range(2)]
    charged = []

    def failing(parameters):
        optimizer = sgd(parameters)

        def look(*_):
            charged.extend((tmp_path / f"{i}.jsonl").read_text().count('"charge"') for i in (0, 1))
            raise ZeroDivisionError

        optimizer.register_step_pre_hook(look)
        return optimizer

    models = [mlp(), mlp()]
    before = [numbers(model) for model in models]
    stack = stack_of(models, [regression(9)] * 2, configured(), ledgers=ledgers, optimizer=failing)
    with pytest.raises(ZeroDivisionError):
        stack.train()
    assert charged == [1, 1]
    assert all(torch.equal(a, numbers(b)) for a, b in zip(before, models, strict=True))


def test_seeded_noise_is_charged_as_none():
    stack = stack_of([mlp()], [regression(9)], configured(), rng=SeededRandom(1))
    assert stack.train()[0].claim["epsilon"] == math.inf
    with pytest.raises(ValueError, match="target_epsilon"):
        stack_of(
            [mlp()],
            [regression(9)],
            configured(noise_multiplier=None, target_epsilon=1.0),
            rng=SeededRandom(1),
        )


# What is refused.


def test_models_and_data_sets_are_each_others_own(tmp_path):
    one = mlp()
    with pytest.raises(ValueError, match="models 0 and 1 share a parameter"):
        stack_of([one, one], [regression(9)] * 2, configured())
    with pytest.raises(ValueError, match="as many of each"):
        stack_of([one], [regression(9)] * 2, configured())
    for ledgers in (
        [NodeLedger("x"), NodeLedger("x", run="other")],
        [NodeLedger("x", path=tmp_path / "l"), NodeLedger("y", path=tmp_path / "." / "l")],
    ):
        with pytest.raises(ValueError, match="ledgers 0 and 1 are of one data set"):
            stack_of([mlp(), mlp()], [regression(9)] * 2, configured(), ledgers=ledgers)


def test_a_loss_that_couples_records_is_refused():
    def coupled(outputs, targets):
        return column(outputs, targets) * outputs.mean()

    with pytest.raises(ModelRefused, match="depends on another record"):
        stack_of([mlp(), mlp()], [regression(9)] * 2, configured(), loss_fn=coupled)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_models_are_trained_the_same_on_cuda():
    config = configured(noise_multiplier=0.0, steps_per_round=3)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        models = [mlp() for _ in range(3)]
        stack = stack_of(models, [regression(n) for n in (0, 1, 7)], config, device=device)
        assert stack.stacked
        stack.train()
        results.append([numbers(model).cpu() for model in models])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
