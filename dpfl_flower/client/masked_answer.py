"""Tells what stands inside of secure aggregation that masks follow, and what they are worth.

>>> masks_follow() is None
True
>>> with under_masks(survivors=3):
...     masks_follow()
3
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

__all__ = ["masks_follow", "under_masks"]

_masked: Final[ContextVar[int | None]] = ContextVar("masked", default=None)


@contextmanager
def under_masks(*, survivors: int) -> Iterator[None]:
    """Tell the app that what it answers inside the block is masked before it leaves the node.

    And in a sum of how many vectors at least this node lets it be unmasked, as far as it sees: at
    least ``Contribution.counts_on``.
    """
    before = _masked.set(survivors)
    try:
        yield
    finally:
        _masked.reset(before)


def masks_follow() -> int | None:
    """Return in a sum of how many vectors at least the answer that is being made is unmasked.

    None where it is not masked at all before it leaves the node.
    """
    return _masked.get()
