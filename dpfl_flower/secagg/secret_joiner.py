"""Secrets put together from shares of which some may be wrong, without trying for long.

Whether a secret is the right one shows, by what its owner committed to; which of its shares were
wrong shows once it is known. Holders that gave the fewest wrong ones are asked first, so that one
that lies about every secret costs no more than the first.

>>> from dpfl_flower.rng import secure
>>> secret, holders = b"k" * 32, {11: 1, 12: 2, 13: 3}
>>> shares = dict(zip(holders, shamir.split(secret, threshold=2, count=3, rng=secure())))
>>> joiner = SecretJoiner(2)
>>> shares[11] = bytes(shamir.SHARE_BYTES)
>>> joiner.join(shares, holders, is_right=lambda found: found == secret, what="are wrong") == secret
True
>>> joiner.wrong
Counter({11: 1})
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from dpfl_flower.rng import RandomSource, secure
from dpfl_flower.secagg import shamir
from dpfl_flower.secagg.errors import RoundAbandoned

__all__ = ["SecretJoiner"]

_MOST_TRIES: Final = 200


class SecretJoiner:
    """Puts the secrets of one round together.

    Parameters
    ----------
    threshold : int
        How many shares it takes.
    rng : RandomSource, optional
        Draws which shares are tried, so that no liar knows it.

    Attributes
    ----------
    wrong : Counter
        How many wrong shares each holder has given so far. Not all are liars: the owner of a secret
        can hand out wrong shares of it.
    """

    def __init__(self, threshold: int, rng: RandomSource | None = None) -> None:
        self._threshold = threshold
        self._rng = rng or secure()
        self.wrong: Counter[int] = Counter()

    def join(
        self,
        shares: Mapping[int, bytes],
        places: Mapping[int, int],
        *,
        is_right: Callable[[bytes], bool],
        what: str,
    ) -> bytes:
        """Return the secret.

        Parameters
        ----------
        shares, places
            A share and its x, by holder.
        is_right : callable
            Whether a secret is the one that is wanted.
        what : str
            Says, after "the shares", what is wrong with them.

        Raises
        ------
        RoundAbandoned
            If there are fewer than ``threshold`` shares, or no choice of right ones came up: of 19
            shares of which 13 are needed and 3 are wrong, one comes up 98 times in 100.
        """
        if len(shares) < self._threshold:
            raise RoundAbandoned(
                f"{len(shares)} shares of a secret came, threshold={self._threshold} must"
            )
        for turn, chosen in enumerate(self._choices(shares)):
            secret = self._combined(shares, places, chosen)
            if secret is not None and is_right(secret):
                if turn:
                    self._note_wrong(shares, places, chosen, secret)
                return secret
        raise RoundAbandoned(f"the shares {what}")

    def _choices(self, shares: Mapping[int, bytes]) -> Iterator[Sequence[int]]:
        """Yield ``threshold`` holders in turn: first those with the fewest wrong shares."""
        holders = sorted(shares, key=lambda holder: (self.wrong[holder], holder))
        yield holders[: self._threshold]
        if len(holders) > self._threshold:
            for _ in range(_MOST_TRIES):
                yield self._rng.sample(holders, self._threshold)

    def _combined(
        self, shares: Mapping[int, bytes], places: Mapping[int, int], holders: Sequence[int]
    ) -> bytes | None:
        try:
            return shamir.combine({places[holder]: shares[holder] for holder in holders})
        except ValueError:
            return None

    def _note_wrong(
        self,
        shares: Mapping[int, bytes],
        places: Mapping[int, int],
        right: Sequence[int],
        secret: bytes,
    ) -> None:
        """Count the shares that do not lie on the polynomial of the right ones."""
        for holder in shares.keys() - set(right):
            if self._combined(shares, places, [*right[1:], holder]) != secret:
                self.wrong[holder] += 1
