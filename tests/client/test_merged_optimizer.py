"""One optimizer for many models only where it is the same as one for each."""

import torch
from torch import nn

from dpfl_flower.client.merged_optimizer import merged


def parameters():
    return [[nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))] for _ in range(3)]


def test_plain_optimizers_are_merged_group_by_group():
    (one,) = merged(
        lambda p: torch.optim.Adam([{"params": [q], "lr": len(q) / 4} for q in p]), parameters()
    )
    assert [len(group["params"]) for group in one.param_groups] == [3, 3]
    assert [group["lr"] for group in one.param_groups] == [0.5, 0.75]


def scheduled(p):
    optimizer = torch.optim.SGD(p, lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def hooked(p):
    optimizer = torch.optim.SGD(p, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


class Own(torch.optim.SGD):
    pass


def test_what_may_look_beyond_one_number_is_kept_apart():
    rates = iter((0.1, 0.2, 0.3))
    for factory in (
        scheduled,
        hooked,
        Own,
        torch.optim.LBFGS,
        torch.optim.Adagrad,
        lambda p: torch.optim.SGD(p, lr=next(rates)),
    ):
        assert len(merged(factory, parameters())) == 3
