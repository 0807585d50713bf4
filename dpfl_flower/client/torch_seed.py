"""Seeds torch's own generators, for what protects nobody: dropout, and checks on made-up records.

``torch.manual_seed`` does the same and more: for each kind of device that is not in use it keeps
the stack of its caller for later, which takes longer than a small user's training.

>>> seed_torch(3)
>>> first = torch.rand(2)
>>> seed_torch(3)
>>> torch.equal(first, torch.rand(2))
True
"""

import torch

__all__ = ["seed_torch"]


def seed_torch(seed: int) -> None:
    """Seed the CPU's generator, and those of CUDA devices where CUDA is in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
