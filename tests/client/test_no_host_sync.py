"""The inner loop of training only queues work: no device, however slow, makes the host wait."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower.client import (
    NODE_LOGGER,
    ClipStyle,
    DPSGDClient,
    DPSGDConfig,
    NodeLedger,
    StackedDPSGD,
    device_copy,
)
from dpfl_flower.client.device_copy import on_device
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import per_example_clipper
from dpfl_flower.client.per_sample.bookkeeping import BookKeepingClipper
from dpfl_flower.client.record_set import RecordSet
from dpfl_flower.client.sample_sum import SampleSum
from dpfl_flower.rng import secure
from tests.support.host_sync import META, Waits, no_host_sync

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def meta_as_cuda(monkeypatch):
    """Lets "meta" stand in for CUDA, and return what was page-locked."""
    locked = []
    monkeypatch.setattr(device_copy, "_QUEUES", {"meta"})
    monkeypatch.setattr(device_copy, "_page_locked", lambda t: locked.append(t.shape) or t)
    return locked


# What is watched for.

WAITS = {
    "a number": lambda x: float(x[0]),
    "a verdict": lambda x: bool((x > 0).any()),
    "numbers": lambda x: x.tolist(),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a masked write": lambda x: x.index_put_((x > 0,), x[0]),
    "a list of places": lambda x: x[[0, 1]],
    "a tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
    "a copy to it": lambda x: torch.ones(3).to(x.device),
    "a copy into it": lambda x: x.copy_(torch.ones(3)),
    "a copy from it": lambda x: x.to("cpu", non_blocking=True),
    "numbers of both": lambda x: x + torch.ones(3),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_each_way_to_wait_is_found(wait):
    with pytest.raises(Waits), no_host_sync():
        wait(torch.ones(3, device=META))


def test_queued_work_is_none():
    x = torch.ones(3, device=META)
    with no_host_sync():
        x.copy_(torch.ones(3), non_blocking=True)
        y = torch.ones(3).to(META, non_blocking=True)
        (x + y).masked_fill_(x > 0, 0).double().add_(torch.tensor(1.0)).sum()
        assert float(torch.ones(3)[torch.ones(3) > 0].sum()) == 3  # the host's own


# Copies.


def test_what_goes_to_a_device_is_page_locked_and_queued(meta_as_cuda):
    with no_host_sync():
        assert on_device(torch.ones(3), META).device == META
        assert on_device(torch.ones(2, device=META), META).device == META
    assert on_device(torch.ones(4), CPU).device == CPU
    assert meta_as_cuda == [(3,)]


class Pairs(Dataset):
    """Records that are made one by one."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((3,), float(index)), index


@pytest.mark.parametrize("kind", ["on the host", "on the device", "one by one"])
def test_records_are_gathered_without_a_wait(kind, meta_as_cuda):
    where = META if kind == "on the device" else CPU
    made = TensorDataset(torch.ones(5, 3, device=where), torch.ones(5, device=where))
    records = RecordSet(Pairs() if kind == "one by one" else made, META)
    with no_host_sync():
        inputs, targets = records.gather([1, 4, 4])
    assert (inputs.shape, targets.shape) == ((3, 3), (3,))
    assert inputs.device == targets.device == META
    assert len(meta_as_cuda) == 2  # of places, where the records lie on the device


def test_records_of_the_host_are_what_they_were():
    for data in (Pairs(), TensorDataset(torch.arange(5.0).repeat(3, 1).T, torch.arange(5))):
        inputs, targets = RecordSet(data, CPU).gather([4, 0, 4])
        assert inputs.tolist() == [[4.0] * 3, [0.0] * 3, [4.0] * 3]
        assert targets.tolist() == [4, 0, 4]
        assert [len(part) for part in RecordSet(TensorDataset(inputs), CPU).gather([])] == [0]


# The steps.


class Tokens(nn.Module):
    """A table, whose rule sorts, and a bag."""

    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Embedding(9, 4, padding_idx=0), nn.EmbeddingBag(9, 4)
        self.normal, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.normal(self.table(ids).mean(1) + self.bag(ids)))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS = {
    "mlp": (mlp, torch.randn(20, 5)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 90, 3, stride=4),  # few positions and wide: ghost norms
            nn.InstanceNorm2d(90, affine=True),
            nn.Flatten(),
            nn.Linear(360, 3),
        ),
        torch.randn(20, 2, 8, 8),
    ),
    "tokens": (Tokens, torch.randint(9, (20, 6))),
}


def configured(**changes):
    settings = {
        "sampling_rate": 0.5,
        "steps_per_round": 2,
        "planned_rounds": 9,
        "clip_norm": 1.0,
        "expected_batch_size": 10.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "max_physical_batch_size": 8,
    }
    return DPSGDConfig(**{**settings, **changes})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def client_on(device, model, data, config):
    """Return a client as `DPSGDClient` builds it, moved to a device that it would refuse."""
    client = DPSGDClient(
        model,
        data,
        config=config,
        loss_fn=CROSS_ENTROPY,
        optimizer=sgd,
        ledger=NodeLedger("test"),
        device="cpu" if device == META else device,
    )
    if device == META:
        client._model, client._records = model.to(device), RecordSet(data, device)
    return client


def stack_on(device, config, *, models=3, data_on=CPU):
    stacked = [mlp() for _ in range(models)]
    inputs, targets = torch.randn(20, 5, device=data_on), torch.ones(20, device=data_on).long()
    datasets = [TensorDataset(inputs[:n], targets[:n]) for n in (20, 7, 0)]
    stack = StackedDPSGD(
        stacked,
        datasets,
        config=config,
        loss_fn=CROSS_ENTROPY,
        optimizer=sgd,
        ledgers=[NodeLedger(f"ward-{index}") for index in range(models)],
        example=(torch.zeros(5), torch.tensor(0)),
        device="cpu" if device == META else device,
    )
    assert stack.stacked
    if device == META:
        stack._records = [RecordSet(data, device) for data in datasets]
        stack._example = [part.to(device) for part in stack._example]
        for model in stacked:
            model.to(device)
    return stack


@pytest.fixture
def no_record_is_dropped(caplog):
    """Fail where a step failed for a record: what raises on the way would count as zeros."""
    with caplog.at_level(logging.INFO, logger=NODE_LOGGER):
        yield
    assert not [r.message for r in caplog.records if "counts as zeros" in r.message]


STEPS = [(name, style, "host") for name in MODELS for style in ClipStyle]
STEPS += [(name, ClipStyle.FLAT, "device") for name in MODELS]


@pytest.mark.parametrize(("name", "style", "data_on"), STEPS)
def test_a_clients_steps_make_the_host_wait_for_nothing(
    name, style, data_on, meta_as_cuda, no_record_is_dropped
):
    data_on = META if data_on == "device" else CPU
    build, inputs = MODELS[name]
    data = TensorDataset(inputs.to(data_on), torch.zeros(20, dtype=torch.long, device=data_on))
    client = client_on(META, build(), data, configured(clip_style=style))
    client._train(BookKeepingClipper, 1.0)  # constants go to the device once
    meta_as_cuda.clear()
    with no_host_sync():
        client._train(BookKeepingClipper, 1.0)
    assert len(meta_as_cuda) >= 2 * 2  # dither and noise of each step, at least


def test_what_an_adaptive_clip_norm_follows_is_added_up_on_the_device(meta_as_cuda):
    data = RecordSet(TensorDataset(torch.randn(20, 5), torch.zeros(20, dtype=torch.long)), META)
    with per_example_clipper(mlp().to(META), CROSS_ENTROPY, clip_norm=1.0) as clipper:
        sample = SampleSum(clipper, data.gather)
        sample.add(range(7))
        with no_host_sync():
            sample.add(range(7, 12))
            fitting = sample.fitting()
            noisy = NoisyGradient(1.0, 1.0, secure())([fitting.reshape(1)], clip_norm=0.5)
    assert fitting.device == noisy[0].device == META


@pytest.mark.parametrize("data_on", ["cpu", "meta"])
@pytest.mark.parametrize("style", [ClipStyle.FLAT, ClipStyle.AUTOMATIC])
def test_stacked_steps_make_the_host_wait_for_nothing(
    style, data_on, meta_as_cuda, no_record_is_dropped
):
    stack = stack_on(META, configured(clip_style=style), data_on=data_on)
    stack._train(range(3), 1.0)
    with no_host_sync():
        stack._train(range(3), 1.0)


def test_a_stacked_pass_sends_each_part_of_all_records_at_once(meta_as_cuda):
    stack = stack_on(META, configured(sampling_rate=1.0, steps_per_round=1))
    _, sample = stack._stack(range(3))
    with no_host_sync():
        sample.sums([range(4), range(3), []])
    width = sample._width
    assert meta_as_cuda == [(3, width, 5), (3, width), (3, width)]  # inputs, targets, which count


# On a device.


@pytest.fixture
def waiting_raises():
    """Let torch itself raise where it waits for the device."""

    def watched(call):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("source", ["host", "device-philox"])
@pytest.mark.parametrize(("name", "style", "data_on"), STEPS)
def test_a_clients_steps_do_not_wait_on_cuda(
    name, style, data_on, source, waiting_raises, no_record_is_dropped
):
    build, inputs = MODELS[name]
    inputs, targets = inputs.clone(), torch.zeros(20, dtype=torch.long)
    if data_on == "device":
        inputs, targets = inputs.cuda(), targets.cuda()
    config = configured(clip_style=style, noise_source=source)
    client = client_on(torch.device("cuda"), build(), TensorDataset(inputs, targets), config)
    client._train(BookKeepingClipper, 1.0)  # constants go to the device once
    before = client.get_parameters({})
    waiting_raises(lambda: client._train(BookKeepingClipper, 1.0))
    after = client.get_parameters({})
    assert all(np.isfinite(a).all() for a in after)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("data_on", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["host", "device-philox"])
def test_stacked_steps_do_not_wait_on_cuda(source, data_on, waiting_raises, no_record_is_dropped):
    config = configured(noise_source=source)
    stack = stack_on(torch.device("cuda"), config, data_on=torch.device(data_on))
    stack._train(range(3), 1.0)
    before = [p.detach().cpu().clone() for model in stack._models for p in model.parameters()]
    waiting_raises(lambda: stack._train(range(3), 1.0))
    after = [p.detach().cpu() for model in stack._models for p in model.parameters()]
    assert all(bool(p.isfinite().all()) for p in after)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
