"""What is kept of a sequence between two answers: its KV cache, the tokens in it, and the sums of their tapped hidden states."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np

from crayon_runtime.errors import EngineClosed

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter, Cache, Step

    Ids = npt.NDArray[np.int64]
    TapSum = npt.NDArray[np.float64]

PREFILL_CHUNK = 256
"""The most tokens that one backend call feeds, so that a long prompt can be cancelled and other answers get their turn."""

CHECKPOINT_EVERY = 32
"""Decoded tokens between two checkpoints. At a hidden size of 4096 that is 1 KiB a token, far less than its keys and values."""


class Session:
    """A sequence of tokens that the next prompt may continue: what the two have in common is not computed again.

    Made by `Engine.session`; it runs one answer at a time. To keep the means of hidden states exact, it goes back only to a
    checkpoint, which is a length whose sum it knows: the end of each prefilled chunk, of each answer, and some between.
    """

    def __init__(self, cache: Cache, lock: threading.RLock, *, context_length: int, tap_size: int) -> None:
        self._cache: Cache | None = cache
        self._lock = lock  # the engine's: one backend call at a time
        self._tokens = np.empty(context_length, np.int64)
        self._length = 0
        self._tap_sum = np.zeros(tap_size, np.float64)
        self._checkpoints: list[tuple[int, TapSum]] = []
        self.busy = False
        """Whether an answer is running in it."""

    @property
    def tokens(self) -> list[int]:
        """The ids in the cache."""
        ids: list[int] = self._tokens[: self._length].tolist()
        return ids

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return self._length

    @property
    def tap_sum(self) -> TapSum:
        """float64 [D]: the tapped hidden states, summed over the tokens in the cache. A copy."""
        return self._tap_sum.copy()

    def begin(self, ids: Ids, adapter: Adapter | None) -> int:
        """Go back to the last checkpoint at which `ids` still agrees and has a token left to feed; return its length.

        With another adapter than before that is 0.
        """
        with self._calling() as cache:
            common = common_prefix(self._tokens[: self._length], ids) if cache.adapter is adapter else 0
            usable = [c for c in self._checkpoints if c[0] <= min(common, len(ids) - 1)]
            length, tap_sum = usable[-1] if usable else (0, np.zeros_like(self._tap_sum))
            if length == 0:
                cache.reset(adapter)
            elif length < self._length:
                cache.rewind(length)
            self._length, self._checkpoints = length, usable
            self._tap_sum[:] = tap_sum
        return length

    def prefill(self, ids: Ids, cancelled: Callable[[], bool] = lambda: False) -> Step | None:
        """Append tokens, chunk by chunk; None if `cancelled` became true before the last of them was fed."""
        step = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            if cancelled():
                return None
            chunk = ids[start : start + PREFILL_CHUNK]
            with self._calling() as cache:
                step = cache.prefill(chunk)
                self._append(chunk, step)
            self.checkpoint()
        return step

    def decode(self, token: int) -> Step:
        """Append one token."""
        with self._calling() as cache:
            step = cache.decode(token)
            self._append((token,), step)
        if self._length % CHECKPOINT_EVERY == 0:
            self.checkpoint()
        return step

    def checkpoint(self) -> None:
        """Make the present length one to go back to."""
        if self._length > (self._checkpoints[-1][0] if self._checkpoints else 0):
            self._checkpoints.append((self._length, self.tap_sum))

    def close(self) -> None:
        """Free the cache. An answer that is still running in it ends with `EngineClosed`."""
        with self._lock:
            if self._cache is not None:
                self._cache.close()
                self._cache = None
                self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _calling(self) -> Iterator[Cache]:
        with self._lock:
            if self._cache is None:
                raise EngineClosed(
                    "the session was closed, or its engine", do="close the engine when the last answer has ended"
                )
            try:
                yield self._cache
            except BaseException:  # Ctrl-C too: nobody knows what the cache holds now
                self._forget()
                raise

    def _append(self, ids: Ids | Sequence[int], step: Step) -> None:
        self._tokens[self._length : self._length + len(ids)] = ids
        self._length += len(ids)
        np.add(self._tap_sum, step.tap_sum, out=self._tap_sum)

    def _forget(self) -> None:
        self._length = 0
        self._checkpoints = []


def common_prefix(a: Ids, b: Ids) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n
