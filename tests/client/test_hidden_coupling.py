"""What a server's weights, or a model's memory, could hide from the checks on a model."""

import pytest
import torch
from torch import nn

from dpfl_flower.accounting import CustomSampling, DistributedDiscreteGaussian, Gaussian
from dpfl_flower.accounting.accountant import quick_epsilon
from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_example import Clip, GradientEngine, per_example_clipper
from dpfl_flower.client.per_sample.single import SingleClipper
from dpfl_flower.client.separable import require_separable

LOSS = nn.MSELoss(reduction="none")
EXAMPLE = (torch.zeros(1, 3), torch.zeros(1, 1))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        h = self.body(x)
        return self.head(h - h.mean(0))


def test_a_head_of_zeros_does_not_hide_that_records_meet_and_stays_as_it_was():
    model = Centred()
    with pytest.raises(ModelRefused):
        require_separable(model, LOSS, EXAMPLE, engine=GradientEngine.BOOKKEEPING)
    assert not model.head.weight.any()


class Remembers(nn.Linear):
    before = None

    def forward(self, x):
        out = super().forward(x)
        if self.before is not None:
            out = out + 100 * self.before
        self.before = x.detach().sum()
        return out


def test_alone_a_record_does_not_meet_what_a_model_remembers_of_another():
    records, one = torch.ones(2, 3), torch.full((1, 3), 7.0)
    sums = []
    for x in (records, torch.cat([one, records])):
        torch.manual_seed(0)
        model = Remembers(3, 1)
        with SingleClipper(model, LOSS, clip=Clip(1.0)) as clipper:
            total = clipper.clipped_sum((x, torch.zeros(len(x), 1)))
        sums.append(torch.cat([part.flatten() for part in total]).double())
    assert float((sums[1] - sums[0]).norm()) <= 1.0 + 1e-6


def test_ghost_clipping_is_refused_where_its_second_pass_would_round():
    with pytest.raises(ValueError, match="engine='ghost'"):
        per_example_clipper(
            nn.Linear(3, 1), LOSS, clip_norm=1.0, engine=GradientEngine.GHOST, autocast=True
        )


def test_a_quick_price_of_what_only_a_curve_prices_is_no_gaussians():
    made = {"squared_scale": 4, "shares": 100, "l2_sensitivity": 1, "l1_sensitivity": 1}
    event = DistributedDiscreteGaussian(**made, dimension=2**20)
    crowd = [Gaussian(10.0 + i) for i in range(20)]
    assert quick_epsilon([event, *crowd], delta=1e-5, relation="zero-out") == float("inf")
    assert quick_epsilon(crowd, delta=1e-5, relation="zero-out") < float("inf")


def test_a_price_cannot_be_set_on_an_instance():
    class Rule(CustomSampling):
        population = 5
        expected_cohort = 1

        def draw(self, registry, rng):
            return []

    for name in ("event", "supports"):
        with pytest.raises(TypeError, match="cannot be overridden"):
            setattr(Rule(), name, lambda *_: None)
