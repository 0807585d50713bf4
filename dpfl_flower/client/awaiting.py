"""A request whose answer gets noise on its way out of the node, known to the app behind the mod.

Sums without noise are answered to such a request only, and whoever hands it over adds the noise. It
does not travel to the app in the message, where a server could put one too.

>>> request_awaiting_noise() is None
True
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.local_request import LocalRequest

__all__ = ["AwaitingRequest", "awaiting_noise", "request_awaiting_noise"]

AwaitingRequest = DistributedRequest | LocalRequest

_awaiting: Final[ContextVar[AwaitingRequest | None]] = ContextVar("awaiting", default=None)


@contextmanager
def awaiting_noise(request: AwaitingRequest) -> Iterator[None]:
    """Let the app that is called in the block answer ``request`` without noise.

    Only for whoever adds the noise to that answer: a share of it, or all.
    """
    token = _awaiting.set(request)
    try:
        yield
    finally:
        _awaiting.reset(token)


def request_awaiting_noise() -> AwaitingRequest | None:
    """Return the request to whose answer noise will be added; None: there is none.

    An app of its own kind behind `noise_share_mod` or `local_noise_mod` answers
    ``request.open_sum().total`` of its units to it, as `user_cohort_app` does, each of them drawn
    by a secret coin of ``request.sampling_rate``.
    """
    return _awaiting.get()
