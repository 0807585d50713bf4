"""Kills this process, as the power would go, at a chosen moment of what it writes and sends."""

import os
import signal
from collections.abc import Callable
from typing import Any


class KillPoints:
    """Counts moments and raises SIGKILL at the ``at``-th (never, at 0).

    Moments are just before and just after each fsync, each atomic replacement and each call of
    `around`, and before, amid and after each write to a descriptor: amid, half of it is written.
    """

    def __init__(self, at: int) -> None:
        self._at = at
        self.count = 0

    def install(self) -> None:
        """Wrap the calls of this process that make data durable; there is no way back."""
        os.fsync = self.around(os.fsync)
        os.replace = self.around(os.replace)  # Path.replace calls it too
        write = os.write

        def torn_write(descriptor: int, data: bytes) -> int:
            self.moment()
            if self.count + 1 == self._at:
                write(descriptor, data[: len(data) // 2])
            self.moment()
            written = write(descriptor, data)
            self.moment()
            return written

        os.write = torn_write

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with a moment before and a moment after it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.moment()
            result = function(*args, **kwargs)
            self.moment()
            return result

        return wrapped

    def moment(self) -> None:
        """Count one moment; at the chosen one, never return."""
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
