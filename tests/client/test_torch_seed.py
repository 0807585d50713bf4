"""Only the generators of the CPU and of the device in use are seeded, and they are put back."""

import torch

from dpfl_flower.client.torch_seed import forked_seeds, seed_torch


def fake_cuda(monkeypatch, *, devices, current):
    generators = tuple(torch.Generator() for _ in range(devices))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: [g.manual_seed(seed) for g in generators]
    )
    return generators


def seeded(generators, seed):
    return [g.initial_seed() == seed for g in generators]


def test_other_devices_keep_their_state(monkeypatch):
    generators = fake_cuda(monkeypatch, devices=3, current=1)
    with torch.random.fork_rng([]):
        seed_torch(12345, torch.device("cuda", 2))
        assert seeded(generators, 12345) == [False, False, True]
        seed_torch(777, torch.device("cuda"))
        assert seeded(generators, 777) == [False, True, False]
        seed_torch(999)
        assert seeded(generators, 999) == [True, True, True]
        seed_torch(555, torch.device("cpu"))
        assert seeded(generators, 555) == [False, False, False]
        assert torch.initial_seed() == 555


def test_the_cpus_state_is_put_back():
    before = torch.random.get_rng_state()
    with forked_seeds(torch.device("cpu")):
        seed_torch(3, torch.device("cpu"))
        torch.rand(2)
    assert torch.equal(before, torch.random.get_rng_state())
