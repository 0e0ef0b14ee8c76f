"""One answer of a server LLM as it comes: bounded in time and size, and looked at before it is handed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from crayon_runtime.download import plain, retry_after
from crayon_runtime.events import LARGEST_EVENT, EventReader, EventTooLarge
from crayon_server.upstream.errors import MODEL_NOT_FOUND, UpstreamError, broken, cut, late, too_much

if TYPE_CHECKING:
    import httpx

LARGEST_ANSWER = 16 << 20
"""Bytes; of a stream too."""
_LARGEST_ERROR = 64 << 10

JSON, EVENTS = "application/json", "text/event-stream"
DONE = b"[DONE]"

_ABOUT_THE_REQUEST = (400, 413, 422)
_TRANSIENT = (408, 425, 500, 502, 504)


class Problem(Struct):
    """OpenAI's error object, as far as it is needed; others leave most of it out."""

    message: str = ""
    param: Any = None
    code: Any = None


class Message(Struct):
    content: str | None = None


class Choice(Struct):
    message: Message


class Completion(Struct):
    """A chat completion, as far as it is needed."""

    choices: list[Choice] | None = None
    error: Problem | str | None = None


class ChunkChoice(Struct):
    finish_reason: str | None = None


class Chunk(Struct):
    """A part of a streamed chat completion, as far as it is needed."""

    choices: list[ChunkChoice] | None = None
    error: Problem | str | None = None


T = TypeVar("T")


class Reply:
    """An answer whose head is there. Close it.

    Args:
        where: who sends it.
        first_by: the time of the event loop by which its first byte has to be there.
        idle: seconds without a byte after that.
        end: the time of the event loop by which all of it has to be there.
    """

    def __init__(self, response: httpx.Response, where: str, *, first_by: float, idle: float, end: float) -> None:
        self._response, self._where = response, where
        self._chunks = response.aiter_raw()
        self._idle, self._next_by, self._end = idle, first_by, end
        self._first: bytes | None = None

    async def begin(self, kind: str) -> None:
        """Wait for the first byte, of an answer of this media type.

        Raises:
            UpstreamError: it is a refusal, or something else.
        """
        headers = self._response.headers
        if self._response.status_code != 200:
            raise await self._refusal()
        found = headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != kind:
            raise broken(f"{plain(found) or 'something'} instead of {kind}", self._where)
        if headers.get("content-encoding", "identity") != "identity":
            raise broken("what was not asked for: compressed data", self._where)
        self._first = await self._chunk()

    async def whole(self, largest: int) -> bytes:
        """The body.

        Raises:
            UpstreamError: it is cut off, late, or more than `largest` bytes.
        """
        body = bytearray()
        while chunk := await self._chunk():
            body += chunk
            if len(body) > largest:
                raise too_much(largest, self._where)
        return bytes(body)

    async def completion(self) -> tuple[bytes, Completion]:
        """The body, which is a chat completion, as it came and as what it means.

        Raises:
            UpstreamError: it is none.
        """
        body = await self.whole(LARGEST_ANSWER)
        found = decoded(body, Completion, self._where)
        if found.error is not None:
            raise self._failure(found.error)
        if not found.choices:
            raise broken("no answer", self._where)
        return body, found

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The data of each event, which is a part of a chat completion, without what says that it was the last.

        Raises:
            UpstreamError: there is none, or it is something else, or the answer is cut off, late, or too much.
        """
        reader, size, begun, finished = EventReader(), 0, False, False
        try:
            while chunk := await self._chunk():
                size += len(chunk)
                if size > LARGEST_ANSWER:
                    raise too_much(LARGEST_ANSWER, self._where)
                for data in reader.feed(chunk):
                    if data == DONE and begun:
                        return
                    finished |= self._is_last(data)
                    begun = True
                    yield data
            if not finished:
                raise cut(self._where)
        except EventTooLarge:
            raise too_much(LARGEST_EVENT, self._where) from None
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Stop it, if it is still coming."""
        await self._response.aclose()

    async def _chunk(self) -> bytes:
        """The next bytes; none at the end."""
        import httpx

        if self._first is not None:
            first, self._first = self._first, None
            return first
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout_at(min(self._end, self._next_by)):
                chunk = await anext(self._chunks, b"")
        except TimeoutError:
            raise late("did not answer in time", self._where) from None
        except httpx.RequestError:
            raise cut(self._where) from None
        self._next_by = now() + self._idle
        return chunk

    def _is_last(self, data: bytes) -> bool:
        chunk = decoded(data, Chunk, self._where)
        if chunk.error is not None:
            raise self._failure(chunk.error)
        if chunk.choices is None:
            raise broken("an event that is no part of an answer", self._where)
        return any(choice.finish_reason is not None for choice in chunk.choices)

    def _failure(self, error: Problem | str) -> UpstreamError:
        """An error where an answer was expected."""
        said = plain(error if isinstance(error, str) else error.message)
        return UpstreamError("the server LLM failed", said=said, where=self._where, do="look at its log")

    async def _refusal(self) -> UpstreamError:
        status, where = self._response.status_code, self._where
        wait = retry_after(self._response.headers.get("retry-after"))
        if self._response.is_redirect:
            to = plain(self._response.headers.get("location", "elsewhere"))
            return UpstreamError(f"the server LLM redirects to {to}", where=where, do="give that address instead")
        if status in (401, 403):
            return UpstreamError("the server LLM refuses the key", where=where, do="give its key in a file")
        if status == 404:
            what = "the server LLM has no such model, or is not at this address"
            return UpstreamError(what, where=where, do="check its address and the model's name", code=MODEL_NOT_FOUND)
        if status in (429, 503):
            what = "the server LLM is busy"
            return UpstreamError(
                what, where=where, do="try again later", status=503, code="busy", wait=wait, again=True
            )
        if status in _ABOUT_THE_REQUEST:
            return await self._objection()
        what = f"the server LLM failed (HTTP status {status})"
        return UpstreamError(what, where=where, do="look at its log", wait=wait, again=status in _TRANSIENT)

    async def _objection(self) -> UpstreamError:
        """What it does not like about the request, in its own words if they are in OpenAI's form."""
        status = self._response.status_code
        try:
            error = msgspec.json.decode(await self.whole(_LARGEST_ERROR), type=Completion).error
        except (UpstreamError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            error = None
        said = error if isinstance(error, Problem) else Problem(error or "")
        param, code = (plain(field) if isinstance(field, str) else None for field in (said.param, said.code))
        what = f"the server LLM refuses the request (HTTP status {status})"
        return UpstreamError(what, said=plain(said.message), where=self._where, status=status, param=param, code=code)


def decoded(body: bytes, kind: type[T], where: str) -> T:
    """JSON. Raises UpstreamError if it is not of this kind."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise broken("what is no answer", where) from None
