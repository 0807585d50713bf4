"""Where a node trains: what draws and copies noise knows the CPU and CUDA devices, and no other.

>>> training_device("cpu")
device(type='cpu')
>>> training_device("meta")
Traceback (most recent call last):
    ...
ValueError: device='meta' must be 'cpu' or a CUDA device: noise is drawn for no other
"""

import torch

__all__ = ["training_device"]


def training_device(device: torch.device | str | None) -> torch.device:
    """Return ``device``, or what is there where it is None: CUDA, else the CPU.

    Raises
    ------
    ValueError
        For any other kind of device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device={str(device)!r} must be 'cpu' or a CUDA device: noise is drawn for no other"
        )
    return found
