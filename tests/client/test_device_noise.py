"""Noise on the device: the host's law, and said to be not cryptographic wherever epsilon is."""

import bisect
import itertools
import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from scipy.stats import chi2
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.accounting import Ledger
from dpfl_flower.client import (
    DPSGDClient,
    DPSGDConfig,
    NodeError,
    NodeErrorCode,
    NodeLedger,
    NodePolicy,
    StackedDPSGD,
    device_noise,
    noisy_gradient,
)
from dpfl_flower.client import dp_sgd as client_module
from dpfl_flower.client.device_noise import draw_on_device
from dpfl_flower.noise.rounded_gaussian import probabilities
from dpfl_flower.rng import secure
from dpfl_strategies import NodeClaim, NodePrivacyReport

CPU = torch.device("cpu")
ALLOWED = NodePolicy(allow_device_noise=True)
SAYS = "noise not cryptographic"
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def configured(**changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 2,
        "planned_rounds": 9,
        "clip_norm": 2.0,
        "expected_batch_size": 4.0,
        "delta": 1e-5,
        "noise_multiplier": 1.5,
        "noise_source": "device-philox",
    }
    return DPSGDConfig(**{**settings, **changes})


def column(outputs, targets):
    return (outputs[:, 0] - targets) ** 2


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def client_of(config, *, d=3, n=5, ledger=None, policy=ALLOWED, device="cpu"):
    return DPSGDClient(
        nn.Linear(d, 1, bias=False),
        TensorDataset(torch.zeros(n, d), torch.ones(n)),
        config=config,
        loss_fn=column,
        optimizer=sgd,
        ledger=ledger or NodeLedger("heart"),
        policy=policy,
        device=device,
        example=(torch.zeros(d), torch.tensor(0.0)),
    )


@pytest.fixture
def cpu_as_device(monkeypatch):
    """Lets a CPU stand in for the device: the same code, with torch's generator of CPUs."""
    for module in (client_module, noisy_gradient):
        monkeypatch.setattr(module, "require_noise_source", lambda *_: None)


# The law.


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_CUDA])]
)
def test_the_noise_has_the_hosts_law(device):
    """At 1e6 draws a scale 3 % off moves the statistic by over 1,500, with 40 degrees."""
    n = 1_000_000
    _, noise = draw_on_device(8, n, torch.device(device), secure())
    half = np.array([float(p) / 2**127 for p in probabilities(8)])
    reach = 20

    def statistic(values):
        counts = np.bincount(np.clip(values, -reach, reach) + reach, minlength=2 * reach + 1)
        expected = n * np.concatenate([half[reach:0:-1], half[: reach + 1]])
        expected[[0, -1]] = n * half[reach:].sum()
        return ((counts - expected) ** 2 / expected).sum()

    values = noise.cpu().numpy().astype(np.int64)
    bound = chi2.isf(1e-7, 2 * reach)
    assert statistic(values) < bound
    assert statistic(np.rint(1.03 * 8 * secure().gaussian(n)).astype(np.int64)) > bound


def test_a_draw_is_decided_by_all_127_bits(monkeypatch):
    table = device_noise._table(3, CPU)
    first, second = table.first.numpy(), table.second.numpy()
    sums = list(itertools.accumulate(probabilities(3)[:0:-1] + probabilities(3)))
    middle, sums = len(sums) // 2, sums[: len(first)]
    in_a_run = int(np.flatnonzero(first == 0)[-2])  # far out many thresholds share their first bits
    places = [in_a_run, *(len(sums) * part // 6 for part in (2, 3, 4))]
    for place, off in itertools.product(places, (-1, 0, 1)):
        words = np.maximum(first[place] + np.array([-1, 0, 1]), 0)
        rest = int(second[place]) + off
        assert -(2**63) <= rest < 2**63
        drawn = iter([torch.tensor([*words.tolist(), 0]), torch.full((device_noise._TIES,), rest)])
        monkeypatch.setattr(device_noise, "_words", lambda *_, drawn=drawn: next(drawn))
        found = device_noise._noise(3, 3, CPU, torch.Generator())
        numbers = [(int(word) << 64) + rest + 2**63 for word in words]
        assert found.tolist() == [bisect.bisect_right(sums, n) - middle for n in numbers]


def test_dither_is_uniform_and_no_seed_of_torch_moves_a_draw():
    n, draws = 200_000, []
    for _ in range(2):
        torch.manual_seed(0)
        dither, noise = draw_on_device(1 << 14, n, CPU, secure())
        assert 0 < float(dither.min()) < float(dither.max()) < 1
        assert abs(float(dither.mean()) - 0.5) < 6 / math.sqrt(12 * n)
        assert abs(float(noise.std()) / 2**14 - 1) < 6 / math.sqrt(2 * n)
        draws += [dither.numpy(), noise.numpy()]
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(n)


D = 100_000


def test_a_clients_noise_is_full_sized_and_fresh_in_each_step(cpu_as_device):
    client = client_of(configured(steps_per_round=4), d=D, n=3)
    before = client.get_parameters({})
    torch.manual_seed(0)
    moves = []
    for _ in range(2):
        torch.manual_seed(0)
        after, _, _ = client.fit(before, {})
        moves.append((after[0] - before[0]).ravel().astype(np.float64))
    stddev = math.sqrt(4) * 1.5 * 2.0 / 4.0  # four steps that repeated noise would make double
    for move in moves:
        assert abs(move.std() / stddev - 1) < 6 / math.sqrt(2 * D)  # 1.3 %
    assert abs(np.corrcoef(moves)[0, 1]) < 6 / math.sqrt(D)


def test_stacked_models_have_noise_of_their_own(cpu_as_device):
    models = [nn.Sequential(nn.Linear(D, 1, bias=False)) for _ in range(2)]
    before = [model[0].weight.detach().double().clone() for model in models]
    stack = StackedDPSGD(
        models,
        [TensorDataset(torch.zeros(3, D), torch.ones(3)) for _ in models],
        config=configured(steps_per_round=1),
        loss_fn=column,
        optimizer=sgd,
        ledgers=[NodeLedger("a"), NodeLedger("b")],
        example=(torch.zeros(D), torch.tensor(0.0)),
        policy=ALLOWED,
        device="cpu",
    )
    assert stack.stacked
    outcomes = stack.train()
    moves = [
        (m[0].weight.detach() - b).numpy().ravel() for m, b in zip(models, before, strict=True)
    ]
    for move, outcome in zip(moves, outcomes, strict=True):
        assert abs(move.std() / 0.75 - 1) < 6 / math.sqrt(2 * D)
        assert SAYS in outcome.claim["statement"]
    assert abs(np.corrcoef(moves)[0, 1]) < 6 / math.sqrt(D)


# What is said.


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match="noise_source='device-philox' needs a CUDA device"):
        client_of(configured())
    with pytest.raises(ValueError, match="noise_source='device-philox' needs a CUDA device"):
        noisy_gradient.NoisyGradient(1.0, 1.0, secure(), source="device-philox")(
            [torch.zeros(2)], clip_norm=1.0
        )
    with pytest.raises(ValueError, match="needs a CUDA device"):
        StackedDPSGD(
            [nn.Sequential(nn.Linear(3, 1))],
            [TensorDataset(torch.zeros(2, 3), torch.zeros(2))],
            config=configured(),
            loss_fn=column,
            optimizer=sgd,
            ledgers=[NodeLedger("heart")],
            example=(torch.zeros(3), torch.tensor(0.0)),
            device="cpu",
        )


@pytest.mark.parametrize("policy", [None, NodePolicy(), NodePolicy(min_noise_multiplier=0.5)])
def test_a_node_refuses_it_unless_its_own_config_allows_it(cpu_as_device, policy):
    client = client_of(configured(), policy=policy)
    with pytest.raises(NodeError, match="allow-device-noise=true in the node config") as refused:
        client.fit(client.get_parameters({}), {})
    assert refused.value.code is NodeErrorCode.POLICY_REFUSED
    assert client.privacy_claim() is None


def test_the_node_config_is_read_strictly():
    assert NodePolicy.from_node_config({"allow-device-noise": True}).allow_device_noise
    assert not NodePolicy.from_node_config({}).allow_device_noise
    for wrong in ("true", 1, "yes"):
        with pytest.raises(ValueError, match=r"allow-device-noise=.* must be true or false"):
            NodePolicy.from_node_config({"allow-device-noise": wrong})


@pytest.mark.parametrize("durable", [True, False])
def test_the_ledger_and_every_later_claim_say_it(cpu_as_device, tmp_path, durable):
    ledger = NodeLedger("heart", path=tmp_path / "ledger.jsonl" if durable else None)
    for source, cryptographic in (
        ("host", True),
        ("device-philox", False),
        ("host", False),  # what was drawn once cannot be taken back
    ):
        client = client_of(configured(noise_source=source), ledger=ledger)
        client.fit(client.get_parameters({}), {})
        claim = client.privacy_claim()
        assert claim["cryptographic"] is cryptographic
        assert (SAYS in claim["statement"]) is not cryptographic
        assert (SAYS in str(NodePrivacyReport({1: NodeClaim.from_record(claim)}))) is (
            not cryptographic
        )
    if not durable:
        return
    assert '"note":{"noise":"not cryptographic' in ledger.path.read_text()
    with Ledger.open(ledger.path, dataset="heart", delta=1e-5, unit="example") as opened:
        assert not opened.cryptographic
        assert str(opened.spent()).endswith(SAYS)


def test_epsilon_is_the_same_number(cpu_as_device):
    epsilons = []
    for source in ("host", "device-philox"):
        client = client_of(configured(noise_source=source))
        client.fit(client.get_parameters({}), {})
        epsilons.append(client.privacy_claim()["epsilon"])
    assert epsilons[0] == epsilons[1]


def test_a_claim_keeps_saying_it(cpu_as_device):
    weak, strong = (client_of(configured(noise_source=s)) for s in ("device-philox", "host"))
    for client in (weak, strong):
        client.fit(client.get_parameters({}), {})
    weak, strong = (NodeClaim.from_record(c.privacy_claim()) for c in (weak, strong))
    assert NodeClaim.from_record(ConfigRecord(weak.to_json())) == weak
    assert not strong.after(weak).cryptographic and not weak.after(strong).cryptographic
    assert SAYS in str(NodePrivacyReport({1: strong, 2: weak}))
    assert SAYS not in str(NodePrivacyReport({1: strong}))
    odd = ConfigRecord({**strong.to_json(), "cryptographic": "yes"})
    assert not NodeClaim.from_record(odd).cryptographic


# On a device.


@pytest.mark.cuda
@NEEDS_CUDA
def test_it_trains_on_cuda_with_noise_of_the_right_size():
    client = client_of(configured(steps_per_round=1), d=D, n=3, device="cuda")
    before = client.get_parameters({})
    moves = []
    for _ in range(2):
        torch.cuda.manual_seed_all(0)
        after, _, _ = client.fit(before, {})
        moves.append((after[0] - before[0]).ravel().astype(np.float64))
    for move in moves:
        assert abs(move.std() / 0.75 - 1) < 6 / math.sqrt(2 * D)
    assert abs(np.corrcoef(moves)[0, 1]) < 6 / math.sqrt(D)
    assert SAYS in client.privacy_claim()["statement"]


@pytest.mark.cuda
@NEEDS_CUDA
def test_drawing_waits_for_no_device():
    device = torch.device("cuda")
    draw_on_device(1 << 14, 1000, device, secure())  # the table goes there once
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_on_device(1 << 14, 1000, device, secure())
    finally:
        torch.cuda.set_sync_debug_mode("default")
