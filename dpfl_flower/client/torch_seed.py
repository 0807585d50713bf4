"""Seeds torch's own generators, for what protects nobody: dropout, and checks on made-up records.

``torch.manual_seed`` does the same and more: for each kind of device that is not in use it keeps
the stack of its caller for later, which takes longer than a small user's training. It also seeds
every CUDA device, and whoever forks the state of one would leave the others seeded.

>>> seed_torch(3)
>>> first = torch.rand(2)
>>> seed_torch(3)
>>> torch.equal(first, torch.rand(2))
True
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked_seeds", "seed_torch"]


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """Seed the CPU's generator and that of ``device``; without one, those of all CUDA devices."""
    torch.default_generator.manual_seed(seed)
    if device is None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
    elif device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.default_generators[index].manual_seed(seed)


@contextmanager
def forked_seeds(device: torch.device) -> Iterator[None]:
    """Put the generators that `seed_torch` seeds for ``device`` back after the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
