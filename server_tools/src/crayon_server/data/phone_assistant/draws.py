"""Random choices that are the same on every version of Python.

Of the `random` module, Python promises only that `Random.random()` keeps its sequence for a seed. Everything here is built on that.
"""

from __future__ import annotations

import hashlib
import math
import random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Draws:
    """One independent stream of draws.

    Args:
        seed: what names the stream, as `("users", 0, "test", 17)`. Streams with different names share nothing.
    """

    def __init__(self, *seed: str | int) -> None:
        name = "/".join(map(str, seed)).encode()
        self._uniform = random.Random(int.from_bytes(hashlib.sha256(name).digest()[:8], "big")).random

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform over low..high, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        point = self._uniform() * math.fsum(weights)  # `sum` rounds differently from Python 3.12 on
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(0, i)
            out[i], out[j] = out[j], out[i]
        return out
