"""Where the noise of DP-SGD is drawn: on the host, or by name on the accelerator.

>>> import torch
>>> require_noise_source(NoiseSource.DEVICE_PHILOX, torch.device("cpu"))
Traceback (most recent call last):
    ...
ValueError: noise_source='device-philox' needs a CUDA device, not 'cpu', whose noise \
comes from dpfl_flower.rng
>>> charge_note(NoiseSource.DEVICE_PHILOX)
{'noise': 'not cryptographic: Philox of 64-bit seeds, on the device'}
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from dpfl_flower.accounting.ledger import NOISE_NOTE

if TYPE_CHECKING:
    import torch

__all__ = ["NoiseSource", "charge_note", "require_noise_source"]


class NoiseSource(StrEnum):
    """What draws a step's noise and dither.

    ``HOST``: AES-256-CTR keyed by the operating system, from `dpfl_flower.rng`.

    ``DEVICE_PHILOX``: torch's Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
    2, 3", SC 2011) on a CUDA device, given 64 fresh secret bits in each step. It is faster for
    large models, and **not cryptographic**: nobody has shown that Philox hides its seed, and
    whoever guesses a step's 64 bits takes its noise off. So epsilon holds against an observer who
    does neither, which the ledger, the node's claim and whatever prints epsilon say beside it, and
    a node refuses it unless its own config says ``allow-device-noise``. Coins are always the
    host's.
    """

    HOST = "host"
    DEVICE_PHILOX = "device-philox"

    @property
    def cryptographic(self) -> bool:
        """Whether telling the noise from random means breaking a cipher."""
        return self is NoiseSource.HOST


def charge_note(source: NoiseSource) -> Mapping[str, str]:
    """Return what the ledger's line on a charge notes about its noise."""
    if source.cryptographic:
        return {}
    return {NOISE_NOTE: "not cryptographic: Philox of 64-bit seeds, on the device"}


def require_noise_source(source: NoiseSource, device: "torch.device") -> None:
    """Raise ValueError unless ``source`` may draw for a model on ``device``."""
    if source is NoiseSource.DEVICE_PHILOX and device.type != "cuda":
        raise ValueError(
            f"noise_source={source.value!r} needs a CUDA device, not {str(device)!r}, whose "
            "noise comes from dpfl_flower.rng"
        )
