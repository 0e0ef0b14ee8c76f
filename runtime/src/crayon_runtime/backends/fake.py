"""A scripted stand-in for a model: no weights, no files, microseconds a token. For tests, yours too.

engine = Engine(FakeBackend([7, 8, 9, 2]), tokenizer)       # every answer is the tokens 7, 8, 9, 2
engine = Engine(FakeBackend(), tokenizer)                   # deterministic noise
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.backends.base import Step
from crayon_runtime.errors import BackendError
from crayon_runtime.sampling import SplitMix64

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.bundle import Bundle

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]
    Script = Sequence[int] | Callable[[list[int], str | None], int | Floats]


@dataclass(frozen=True)
class FakeAdapter:
    """An adapter that is nothing but its name."""

    name: str


class FakeBackend:
    """A model whose answers are scripted.

    Args:
        script: what it says.
            None: logits that depend on every token before, on their order, and on the adapter's name, so that any mix-up of
            caches shows. Token ids: these, one after the other, after every prompt; the last one again and again. A function of
            (all tokens so far, name of the adapter or None): the next token id, or float32 [V] logits.
        vocab_size: V.
        context_length: the most tokens that a cache holds.
        tap_size: D.

    The tapped hidden states are those of `hidden`, whatever the script.
    """

    name = "fake"

    def __init__(
        self, script: Script | None = None, *, vocab_size: int = 512, context_length: int = 128, tap_size: int = 4
    ) -> None:
        self.script = script
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.tap_size = tap_size
        self.calls: Counter[str] = Counter()
        """How often each method was called, of the backend and of its caches, by name."""
        self.prefilled: list[int] = []
        """How many tokens each prefill fed."""
        self.open_caches = 0
        self.closed = False
        self._running = threading.Lock()

    def read_adapter(self, bundle: Bundle) -> FakeAdapter:
        with self.call("read_adapter"):
            return FakeAdapter(bundle.as_adapter.name)

    def new_cache(self, adapter: Adapter | None = None) -> FakeCache:
        with self.call("new_cache"):
            self.open_caches += 1
            return FakeCache(self, adapter)

    def close(self) -> None:
        with self.call("close"):
            self.closed = True

    def hidden(self, ids: Sequence[int], adapter: str | None = None) -> Floats:
        """The hidden states after each of `ids`, float32 [len(ids), D]: multiples of 1/64, so that sums of them are exact."""
        state, rows = seed(adapter), np.empty((len(ids), self.tap_size), np.float32)
        for row, token in zip(rows, ids, strict=True):
            state = advance(state, token)
            write_hidden(state, row)
        return rows

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Count a call; BackendError if it comes while another one runs, or after `close`."""
        if not self._running.acquire(blocking=False):
            raise BackendError(f"{method} was called while another call was running")
        try:
            if self.closed:
                raise BackendError(f"{method} was called after close")
            self.calls[method] += 1
            yield
        finally:
            self._running.release()


class FakeCache:
    """One sequence of a FakeBackend."""

    def __init__(self, backend: FakeBackend, adapter: Adapter | None) -> None:
        self._backend = backend
        self._adapter = adapter
        self._tokens: list[int] = []
        self._states = [seed(adapter.name if adapter else None)]
        self._said = 0
        self._raised: list[int] = []
        self._closed = False
        tap = np.zeros((2, backend.tap_size), np.float32)
        self._step = Step(np.zeros(backend.vocab_size, np.float32), tap[0], tap[1])

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def adapter(self) -> Adapter | None:
        return self._adapter

    def prefill(self, ids: Ids) -> Step:
        with self._backend.call("prefill"):
            self._backend.prefilled.append(len(ids))
            self._said = 0
            return self._feed(ids.tolist())

    def decode(self, token: int) -> Step:
        with self._backend.call("decode"):
            self._said += 1
            return self._feed((token,))

    def rewind(self, length: int) -> None:
        with self._backend.call("rewind"):
            if not 0 <= length <= self.length:
                raise BackendError(f"cannot rewind a cache of {self.length} tokens to {length}")
            del self._tokens[length:], self._states[length + 1 :]

    def reset(self, adapter: Adapter | None) -> None:
        with self._backend.call("reset"):
            self._adapter = adapter
            self._tokens = []
            self._states = [seed(adapter.name if adapter else None)]

    def close(self) -> None:
        with self._backend.call("close_cache"):
            self._backend.open_caches -= not self._closed
            self._closed = True

    def _feed(self, ids: Sequence[int]) -> Step:
        if self._closed or not ids or self.length + len(ids) > self._backend.context_length:
            raise BackendError(f"{len(ids)} tokens in a cache with {self.length} (closed: {self._closed})")
        step = self._step
        step.tap_sum[:] = 0
        for token in ids:
            self._tokens.append(token)
            self._states.append(advance(self._states[-1], token))
            write_hidden(self._states[-1], step.tap_last)
            np.add(step.tap_sum, step.tap_last, out=step.tap_sum)
        self._speak(step.logits)
        return step

    def _speak(self, logits: Floats) -> None:
        for token in self._raised:
            logits[token] = 0
        self._raised.clear()
        script = self._backend.script
        if callable(script):
            said = script(list(self._tokens), self._adapter.name if self._adapter else None)
        elif script is not None:
            said = script[min(self._said, len(script) - 1)]
        else:
            random = SplitMix64(self._states[-1])
            for height in range(1, 9):
                self._raise(logits, random.next() % len(logits), height / 2)
            return
        if isinstance(said, np.ndarray):
            logits[:] = said
        else:
            self._raise(logits, said, 10.0)

    def _raise(self, logits: Floats, token: int, height: float) -> None:
        logits[token] = height
        self._raised.append(token)


def seed(adapter: str | None) -> int:
    """The state before the first token."""
    return zlib.crc32((adapter or "").encode())


def advance(state: int, token: int) -> int:
    """The state after one more token."""
    return SplitMix64(state ^ (token + 1)).next()


def write_hidden(state: int, row: Floats) -> None:
    random = SplitMix64(state)
    for i in range(len(row)):
        row[i] = (random.next() % 256 - 128) / 64
