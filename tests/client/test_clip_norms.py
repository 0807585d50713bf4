"""The clip norm follows a quantile of the norms, and its noisy counts are paid for."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.accounting import Composed, Gaussian, events_from_json
from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger
from dpfl_flower.client.clip_norms import ClipNorms
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import per_example_clipper
from dpfl_flower.client.sample_sum import SampleSum
from dpfl_flower.client.sum_grid import SumGrid
from dpfl_flower.clipping import AdaptiveClipping
from dpfl_flower.rng import SeededRandom, secure


def configured(**changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 40,
        "planned_rounds": 100,
        "clip_norm": 1.0,
        "expected_batch_size": 100.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "adaptive_clipping": AdaptiveClipping(initial=1.0),
    }
    return DPSGDConfig(**{**settings, **changes})


def first_output(outputs, targets):
    return outputs[:, 0]


def client_with(norms, config, **arguments):
    """Return a client whose records have gradients of exactly these norms."""
    inputs = torch.zeros(len(norms), 3)
    inputs[:, 0] = torch.as_tensor(norms)
    return DPSGDClient(
        nn.Linear(3, 1, bias=False),
        TensorDataset(inputs, torch.zeros(len(norms))),
        config=config,
        loss_fn=first_output,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        device="cpu",
        **arguments,
    )


def clip_norm_in(ledger):
    return float(ledger.state.config_records["dpfl-flower.clip-norm.test"]["clip-norm"])


@pytest.mark.parametrize("initial", [0.1, 10.0])
def test_the_clip_norm_moves_to_the_norms_from_either_side(initial):
    adaptive = AdaptiveClipping(initial=initial, indicator_noise=5.0)
    ledger = NodeLedger("test")
    client = client_with(
        torch.ones(100), configured(clip_norm=initial, adaptive_clipping=adaptive), ledger=ledger
    )
    client.fit(client.get_parameters({}), {})
    # 40 steps of 0.2 * 1/2: up to e^4; then about 1, where half of the noise is on each side.
    assert 0.6 < clip_norm_in(ledger) < 1.6


def test_the_clip_norm_goes_on_in_the_next_round_of_a_run_and_only_there():
    def one_round(ledger):
        client = client_with(torch.full((100,), 9.0), configured(steps_per_round=1), ledger=ledger)
        client.fit(client.get_parameters({}), {})
        return clip_norm_in(ledger)

    ledger = NodeLedger("test")
    first, second = one_round(ledger), one_round(ledger)
    assert 1.05 < first < 1.15 and 1.05 < second / first < 1.15
    other = NodeLedger("test", run="another", state=ledger.state)
    assert 1.05 < one_round(other) < 1.15


def test_both_releases_are_charged_as_the_one_gaussian_that_they_are():
    ledger = NodeLedger("test")
    client = client_with(torch.ones(5), configured(steps_per_round=3), ledger=ledger)
    client.fit(client.get_parameters({}), {})
    assert events_from_json(client.privacy_claim()["events"]) == [Composed(Gaussian(1.0), 3)]


def test_the_noise_on_gradients_is_raised_by_what_the_count_costs():
    adaptive = AdaptiveClipping(initial=2.0, indicator_noise=0.8)
    config = configured(clip_norm=2.0, adaptive_clipping=adaptive)
    norms = ClipNorms(config, NodeLedger("test"), noise_multiplier=1.0, rng=secure())
    raised = norms.noise_multiplier
    # The record moves the gradients by C and the count by 1/2: one Gaussian of multiplier 1.
    assert math.hypot(1 / raised, 0.5 / 0.8) == pytest.approx(1.0)
    assert raised == pytest.approx((1 - 1 / 1.6**2) ** -0.5)


def test_the_count_has_the_noise_that_was_paid_for():
    adaptive = AdaptiveClipping(initial=1.0, indicator_noise=5.0, learning_rate=1.0)
    fractions = []
    for _ in range(4000):
        norms = ClipNorms(
            configured(adaptive_clipping=adaptive),
            NodeLedger("test"),
            noise_multiplier=1.0,
            rng=secure(),
        )
        norms.update(lambda: torch.tensor(25.0, dtype=torch.float64))
        fractions.append(0.5 - math.log(norms.current))
    noise = np.asarray(fractions) - 0.75
    # 5.5 standard errors: a false alarm in 2e7; a scale 20 % off is beyond that by 12 more.
    assert abs(noise.std() / 0.05 - 1) < 5.5 / math.sqrt(2 * 4000)
    assert abs(noise.std() / (0.05 * 1.2) - 1) > 5.5 / math.sqrt(2 * 4000)
    assert abs(noise.mean()) < 5.5 * 0.05 / math.sqrt(4000)


def test_a_record_moves_the_count_by_a_half_and_a_broken_one_by_nothing():
    model = nn.Linear(1, 1, bias=False)
    data = torch.tensor([[0.5], [2.0], [math.nan], [math.inf]])

    def records(indices):
        return [data[indices], torch.zeros(len(indices))]

    for engine in ("bookkeeping", "ghost", "hooks", "functorch"):
        with per_example_clipper(model, first_output, clip_norm=1.0, engine=engine) as clipper:
            counts = []
            for indices in ([], [0], [1], [2], [3], [0, 1, 2, 3], [0, 0, 1]):
                sample = SampleSum(clipper, records)
                sample.add(indices)
                counts.append(float(sample.fitting()))
        assert counts == [0.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.5], engine


def test_a_clip_norm_that_stays_asks_for_no_count():
    config = configured(adaptive_clipping=None)
    norms = ClipNorms(config, NodeLedger("test"), noise_multiplier=1.0, rng=secure())
    norms.update(lambda: pytest.fail("it would be added up in every step, for nothing"))
    assert norms.current == 1.0


def test_the_noisy_mean_is_divided_by_the_public_number_and_lies_on_the_grid():
    (mean,) = NoisyGradient(3.0, 10.0, SeededRandom(1))([torch.zeros(1000)], clip_norm=1.0)
    cells = mean.double() * 10 * SumGrid.for_noise_multiplier(3.0, 1000).clip_units
    assert torch.allclose(cells, cells.round(), atol=1e-6)
    assert 0.25 < float(mean.std()) < 0.35


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clip_norm": 2.0}, "adaptive_clipping.initial=1.0 must be clip_norm=2.0"),
        ({"clip_style": "automatic"}, "clip_style='automatic'"),
        ({"clip_style": "per-layer"}, "clip_style='per-layer'"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0"),
        (
            {"adaptive_clipping": AdaptiveClipping(initial=1.0, indicator_noise=0.5)},
            "indicator_noise",
        ),
    ],
)
def test_what_cannot_be_paid_for_or_followed_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        configured(**changes)
