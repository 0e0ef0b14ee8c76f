"""A server LLM that says what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any


class Asked(Iterator[str]):
    """A reply that is told piece by piece; an exception is raised in its place, an event waited for."""

    def __init__(self, pieces: list[Any], cancel: threading.Event | None) -> None:
        self._pieces, self._cancel = iter(pieces), cancel
        self.finish_reason: str | None = None
        self.tokens = 0
        self.sent_bytes = 21
        self.closed = False

    def __next__(self) -> str:
        try:
            piece = next(self._pieces)
        except StopIteration:
            self.finish_reason = self.finish_reason or "stop"
            raise
        if isinstance(piece, Exception):
            raise piece
        if isinstance(piece, threading.Event):
            while not piece.wait(0.01):
                if self._cancel is not None and self._cancel.is_set():
                    self.finish_reason = "cancelled"
                    raise StopIteration
            return next(self)
        self.tokens += 1
        return piece  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed = True


class Told:
    """A server LLM."""

    url = "https://llm.example"

    def __init__(self, *pieces: Any) -> None:
        self.pieces = list(pieces)
        self.queries: list[tuple[str, int | None]] = []
        self.replies: list[Asked] = []

    def request(self, query: str, *, max_tokens: int | None = None) -> bytes:
        return query.encode()

    def ask(self, query: str, *, max_tokens: int | None = None, cancel: threading.Event | None = None) -> Asked:
        self.queries.append((query, max_tokens))
        self.replies.append(Asked(self.pieces, cancel))
        return self.replies[-1]
