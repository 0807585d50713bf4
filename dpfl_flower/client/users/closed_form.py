"""Users whose update the app computes itself: a closed form, a solver, another library.

>>> engine = ClosedFormEngine(lambda arrays, data: {"mean": arrays["mean"] + data})
>>> member = Member("ann", lambda: 2.5)
>>> [update] = engine.updates([member], {"mean": np.zeros(1)}, server_round=1)
>>> update.values[0] - update.reference[0]
array([2.5])
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.client.users.engine import Chunk, Update, UserEngine, contributes_zeros
from dpfl_flower.client.users.registry import Member
from dpfl_flower.layout import Array, ArrayLayout, as_numpy

__all__ = ["ClosedFormEngine", "LocalUpdate"]

LocalUpdate = Callable[[Mapping[str, NDArray[Any]], Any], Mapping[str, Array]]
"""``local_update(global_arrays, user_data)`` returns the arrays after this user's training.

It depends on its two arguments alone, and draws from no generator that users share (torch's,
numpy's or random's own): what a user draws would depend on who came before. The global arrays are
read-only; what comes back has their names and shapes. A user for whom it returns the global arrays
contributes a valid zero update.
"""


@final
class ClosedFormEngine(UserEngine):
    """Asks the app for one user's arrays after the other.

    Parameters
    ----------
    local_update : callable
        See `LocalUpdate`. Called for every member, also one without data.
    """

    def __init__(self, local_update: LocalUpdate) -> None:
        self._local_update = local_update

    @property
    def chunk(self) -> Chunk:
        """One user; what it takes is up to the app."""
        return Chunk(1, 0)

    def updates(
        self, members: Iterable[Member], global_arrays: Mapping[str, Array], *, server_round: int
    ) -> Iterator[Update]:
        """Yield each member's update; see `UserEngine.updates`."""
        arrays = {name: _read_only(array) for name, array in global_arrays.items()}
        layout = ArrayLayout.of(arrays)
        reference = layout.released(arrays)
        for member in members:
            try:
                values = layout.released(self._local_update(arrays, member.load()))
            except Exception as error:
                contributes_zeros(member, error)
                continue
            yield Update(member.user, values, reference)


def _read_only(array: Array) -> NDArray[Any]:
    # What one user's training writes must not reach the next user.
    values = np.array(as_numpy(array))
    values.flags.writeable = False
    return values
