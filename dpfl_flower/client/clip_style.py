"""What the clip norm of DP-SGD bounds."""

from enum import StrEnum

__all__ = ["ClipStyle"]


class ClipStyle(StrEnum):
    """What the clip norm bounds; under each, one record moves the sum by at most that norm.

    ``FLAT``: the whole gradient g is scaled by min(1, C / |g|) (Abadi et al., arXiv 1607.00133).
    ``PER_LAYER``: each of the L layers' parts is clipped to C / sqrt(L) by itself (McMahan et al.,
    arXiv 1710.06963, section 3.1). ``AUTOMATIC``: g is scaled by C / (|g| + 0.01), so that C is no
    more than a learning rate (AUTO-S: Bu et al., arXiv 2206.07136, section 4).
    """

    FLAT = "flat"
    PER_LAYER = "per-layer"
    AUTOMATIC = "automatic"
