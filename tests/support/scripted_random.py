"""Random sources whose words a test chooses, or counts."""

import numpy as np

from dpfl_flower.rng import RandomSource


class ScriptedRandom(RandomSource):
    """Hands out the given 64-bit words in order, and fails when they are used up."""

    def __init__(self, words):
        self._bytes = b"".join(int(word).to_bytes(8, "little") for word in words)

    @property
    def protects(self):
        return False

    @property
    def words_left(self):
        return len(self._bytes) // 8

    def random_bytes(self, n):
        if n > len(self._bytes):
            raise AssertionError("the script has run out of words")
        taken, self._bytes = self._bytes[:n], self._bytes[n:]
        return taken


class CountingRandom(RandomSource):
    """Passes another source on and counts the bytes."""

    def __init__(self, source):
        self.source = source
        self.bytes_taken = 0

    @property
    def protects(self):
        return self.source.protects

    def random_bytes(self, n):
        self.bytes_taken += n
        return self.source.random_bytes(n)


def constant_seeds():
    """Seed every generator that noise must not follow, the same way each time."""
    import random

    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
