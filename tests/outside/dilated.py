"""Mask from outside: every `every`-th position within a window."""

from dataclasses import dataclass

from modjax.specs import Mask, named


@named
@dataclass(frozen=True)
class Dilated(Mask):
    size: int
    every: int = 2

    def seen(self, query, key):
        return (abs(query - key) < self.size) & ((query - key) % self.every == 0)

    @property
    def reach(self):
        return self.size - 1, self.size - 1
