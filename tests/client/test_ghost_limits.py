"""Ghost clipping sums in a second pass: what that would round past C is refused before a charge."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client import DPSGDClient, DPSGDConfig, GradientEngine, ModelRefused, NodeLedger
from dpfl_flower.client.engine_choice import choose_engine
from dpfl_flower.client.per_example import Clip, ClipStyle, per_example_clipper

C = 0.5
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
EXACT = [e for e in GradientEngine if e not in (GradientEngine.AUTO, GradientEngine.GHOST)]
EXAMPLE = [torch.zeros(5), torch.tensor(0)]


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def client_for(ledger, *, model=None, engine=GradientEngine.GHOST, **changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 1,
        "planned_rounds": 10,
        "clip_norm": C,
        "expected_batch_size": 10.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
    }
    model = mlp() if model is None else model
    dtype = next(model.parameters()).dtype
    records = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    return DPSGDClient(
        model,
        TensorDataset(records.to(dtype), torch.arange(20) % 3),
        config=DPSGDConfig(**{**settings, **changes}),
        loss_fn=CROSS_ENTROPY,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        ledger=ledger,
        engine=engine,
        example=[EXAMPLE[0].to(dtype), EXAMPLE[1]],
        device="cpu",
    )


@pytest.mark.parametrize(
    ("changes", "dtype", "named"),
    [
        ({"mixed_precision": True}, torch.float32, "mixed precision"),
        ({"clip_style": "per-layer"}, torch.float32, "per-layer"),
        ({}, torch.bfloat16, "bfloat16"),
        ({}, torch.float16, "float16"),
    ],
)
def test_what_ghost_clipping_cannot_bound_is_refused_before_anything_is_charged(
    changes, dtype, named, tmp_path
):
    ledger = NodeLedger("heart", path=tmp_path / "ledger.jsonl")
    with pytest.raises(ModelRefused, match=rf"engine='ghost'.*{named}.*bookkeeping"):
        client = client_for(ledger, model=mlp().to(dtype), **changes)
        client.fit(client.get_parameters({}), {})
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("style", "autocast", "dtype"),
    [
        (ClipStyle.FLAT, True, torch.float32),
        (ClipStyle.PER_LAYER, False, torch.float32),
        (ClipStyle.FLAT, False, torch.bfloat16),
    ],
)
def test_the_clipper_itself_refuses_too(style, autocast, dtype):
    from dpfl_flower.client.per_sample.opacus import GhostClipper

    model = mlp().to(dtype)
    with pytest.raises(ModelRefused, match="engine='ghost'"):
        GhostClipper(model, CROSS_ENTROPY, clip=Clip(C, style), autocast=autocast)
    with pytest.raises(ModelRefused, match="engine='ghost'"):
        per_example_clipper(
            model, CROSS_ENTROPY, clip_norm=C, engine="ghost", style=style, autocast=autocast
        )


class RoundsInside(nn.Module):
    """Rounds between two layers of float32, or runs them under an autocast of its own."""

    def __init__(self, how):
        super().__init__()
        self.how, self.below, self.above = how, nn.Linear(5, 64), nn.Linear(64, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.how == "autocast"):
            h = self.below(x)
            if self.how == "cast":
                h = h.bfloat16().float()
            return self.above(torch.tanh(h)).float()


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_rounding_that_only_the_model_knows_of_is_found(how):
    example = [part.unsqueeze(0) for part in EXAMPLE]
    with pytest.raises(ModelRefused, match="ghost"):
        choose_engine(RoundsInside(how), CROSS_ENTROPY, GradientEngine.GHOST, example, public=True)
    choose_engine(RoundsInside(""), CROSS_ENTROPY, GradientEngine.GHOST, example, public=True)


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("precision", ["bfloat16", "autocast", "float32"])
@pytest.mark.parametrize("style", ["flat", "per-layer", "automatic"])
def test_no_record_adds_more_than_the_clip_norm_in_any_precision(engine, precision, style):
    model = mlp()
    x, y = 10 * torch.randn(32, 5), torch.randint(3, (32,))
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    autocast = precision == "autocast"
    with per_example_clipper(
        model, CROSS_ENTROPY, clip_norm=C, engine=engine, style=style, autocast=autocast
    ) as clipper:
        for i in range(len(x)):
            total = clipper.clipped_sum([x[i : i + 1], y[i : i + 1]])
            assert math.sqrt(sum(float(t.double().square().sum()) for t in total)) <= C * (1 + 1e-6)


@pytest.mark.parametrize("engine", [GradientEngine.GHOST, *EXACT])
def test_an_autocast_around_the_round_rounds_nothing_that_is_summed(engine):
    """The app's own autocast is not the config's: it would round products of scaled gradients."""
    moved = []
    for surrounded in (False, True):
        client = client_for(
            NodeLedger("heart"), engine=engine, noise_multiplier=0.0, expected_batch_size=1.0
        )
        before = client.get_parameters({})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=surrounded):
            after, _, _ = client.fit(before, {})
        moved.append([b - a for a, b in zip(before, after, strict=True)])
    assert all((a == b).all() for a, b in zip(*moved, strict=True))


@pytest.mark.parametrize("changed", ["the clip", "the model"])
def test_what_is_changed_after_the_clipper_was_built_is_refused_too(changed):
    model = mlp()
    batch = [torch.ones(2, 5), torch.tensor([0, 1])]
    with per_example_clipper(model, CROSS_ENTROPY, clip_norm=C, engine="ghost") as clipper:
        clipper.clipped_sum(batch)
        if changed == "the clip":
            clipper.clip = Clip(C, ClipStyle.PER_LAYER)
        else:
            model.bfloat16()
            batch[0] = batch[0].bfloat16()
        with pytest.raises(ModelRefused, match="engine='ghost' must be another one"):
            clipper.clipped_sum(batch)
