"""What an OpenAI-compatible server sends as an answer, which may be anything, to pieces of text.

Whoever reads it bounds how many bytes there are; the text is never longer. Control characters but tabs and line ends are left out.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from msgspec import Struct

from crayon_runtime.download import plain
from crayon_runtime.errors import ServerError
from crayon_runtime.events import EventReader, EventTooLarge

_CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


class Reply(Protocol):
    """An answer that is coming in."""

    done: bool
    """Nothing more belongs to it."""
    finish_reason: str | None
    """Why the server ended it; None: it did not say yet."""
    tokens: int | None
    """How many the server says that there are."""

    def feed(self, content: bytes) -> list[str]:
        """Take what came.

        Returns:
            Pieces of text. An empty one says that the server goes on without any.

        Raises:
            ServerError: this is no answer.
        """

    def end(self) -> list[str]:
        """Nothing more will come. Raises ServerError: something is missing."""


def reply_of(content_type: str, *, where: str) -> Reply:
    """Raises ServerError: this type is not that of an answer."""
    media = content_type.partition(";")[0].strip().lower()
    match media:
        case "text/event-stream":
            return Streamed(where)
        case "application/json":
            return Whole(where)
    found = plain(media) or "what it does not name"
    raise ServerError(f"the server sends {found}, which is not an answer", where=where, do="check the address")


class Streamed:
    """Server-sent events, each with a chunk of the answer, and `[DONE]` at the end."""

    def __init__(self, where: str) -> None:
        self.done = False
        self.finish_reason: str | None = None
        self.tokens: int | None = None
        self._where = where
        self._events = EventReader()

    def feed(self, content: bytes) -> list[str]:
        try:
            events = self._events.feed(content)
        except EventTooLarge:
            raise ServerError("the server sends nonsense in the place of an answer", where=self._where) from None
        return [piece for event in events for piece in self._take_event(event)]

    def end(self) -> list[str]:
        self.done = self.done or b"[DONE]" in self._events.feed(b"\n\n")  # of an event that was not ended
        if not self.done and self.finish_reason is None:
            raise ServerError("the answer was cut off", where=self._where, do="try again later")
        return []

    def _take_event(self, event: bytes) -> list[str]:
        if self.done or event == b"[DONE]":
            self.done = True
            return []
        chunk = _decoded(event, self._where)
        self.tokens = _tokens(chunk.usage, self.tokens)
        pieces = []
        for choice in chunk.choices or ():
            if choice.index in (0, None):
                self.finish_reason = _reason(choice) or self.finish_reason
                pieces.append(_text(choice.delta))
        return pieces


class Whole:
    """One JSON object, as a server answers that does not stream."""

    def __init__(self, where: str) -> None:
        self.done = False
        self.finish_reason: str | None = None
        self.tokens: int | None = None
        self._where = where
        self._content = bytearray()

    def feed(self, content: bytes) -> list[str]:
        self._content += content
        return []

    def end(self) -> list[str]:
        completion = _decoded(bytes(self._content), self._where)
        choice = next((c for c in completion.choices or () if c.index in (0, None)), None)
        if choice is None:
            raise ServerError("the server's answer is empty", where=self._where)
        self.done, self.finish_reason, self.tokens = True, _reason(choice), _tokens(completion.usage, None)
        return [_text(choice.message)]


def message_of(content: bytes) -> str | None:
    """What the body of an error says; None: nothing that could be understood."""
    try:
        error = msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return None
    return _message(error.get("error", error)) if isinstance(error, dict) else None


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    index: int | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Usage(Struct):
    completion_tokens: int | None = None


class _Completion(Struct):
    """A whole one, or a chunk of one."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Completion)
_MANY = 1 << 31


def _decoded(content: bytes, where: str) -> _Completion:
    try:
        completion = _DECODER.decode(content)
    except (ValueError, RecursionError):
        raise ServerError("the server sends nonsense in the place of an answer", where=where) from None
    if completion.error is not None:
        said = _message(completion.error) or "it does not say which"
        raise ServerError(f"the server stopped with an error: {said}", where=where, do="try again later")
    if completion.choices is None:
        raise ServerError("the server sends nonsense in the place of an answer", where=where)
    return completion


def _text(message: _Message | None) -> str:
    return (message.content or "").translate(_CONTROLS) if message else ""


def _reason(choice: _Choice) -> str | None:
    return plain(choice.finish_reason)[:40] if choice.finish_reason else None


def _tokens(usage: _Usage | None, known: int | None) -> int | None:
    said = usage.completion_tokens if usage else None
    return said if said is not None and 0 <= said < _MANY else known


def _message(error: object) -> str | None:
    """In the forms of OpenAI, of this project's services, and of FastAPI."""
    if isinstance(error, dict):
        error = next((error[key] for key in ("message", "what", "detail") if key in error), None)
    return plain(error) or None if isinstance(error, str) else None
