"""The server LLM's routes: what is asked there is passed on to it, and its answer passed back, whole or as it comes.

    POST /v1/chat/completions     {messages, stream, …} in OpenAI's protocol
    GET  /v1/models               the one model there is

The server LLM is not customized, and nothing is added to what it is asked. Whatever is refused is answered with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import msgspec
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from crayon_runtime.server import replies
from crayon_runtime.server.asgi import Message, Receive, Send, read_body
from crayon_runtime.server.errors import Gone, Refused
from crayon_server.service.refusals import described_as_openai
from crayon_server.upstream import Endpoint, UpstreamError
from crayon_server.upstream.reply import DONE, EVENTS, JSON

CONCURRENCY = 8
QUEUE_SECONDS = 5.0
"""For so long a request waits for a place; as many may wait as there are places."""
BUSY_SECONDS = 5
"""After which a client that found no place may ask again."""

_CODES = {502: "upstream_error", 503: "busy", 504: "upstream_timeout"}

_log = logging.getLogger("crayon.service")

Fields = dict[str, msgspec.Raw]


def routes(upstream: Endpoint | None, *, concurrency: int = CONCURRENCY, open_to_all: bool) -> APIRouter:
    """The routes of a server LLM; of none, they say so.

    Args:
        concurrency: how many requests it gets at once.
        open_to_all: no key is needed, so that a page in a browser on this machine must be kept from asking.
    """
    router = APIRouter(dependencies=[Depends(_no_page)] if open_to_all else [], include_in_schema=upstream is not None)
    places = Places(concurrency)
    started = int(time.time())

    @router.post(
        "/v1/chat/completions",
        response_class=Response,
        responses={
            200: {"description": "answered", "content": _ANSWER},
            **described_as_openai(400, 401, 403, 404, 408, 413, 422, 429, 502, 503, 504),
        },
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": _REQUEST}}}},
    )
    async def chat(request: HttpRequest) -> Response:
        """Ask the server LLM."""
        if upstream is None:
            raise _none()
        return _Passed(upstream, places, *parse(await read_body(request)))

    @router.get(
        "/v1/models",
        response_class=Response,
        responses={
            200: {"description": "answered", "content": {JSON: {"schema": {"type": "object"}}}},
            **described_as_openai(401, 403, 404, 429, 502, 503, 504),
        },
    )
    async def models() -> Response:
        """The server LLM's name. Whatever name a request has, this is the one that answers."""
        if upstream is None:
            raise _none()
        try:
            name = await upstream.model()
        except UpstreamError as e:
            raise _refused(e) from e
        content = msgspec.json.encode(replies.ModelList([replies.Model(name, started, None)]))
        return Response(content, media_type=JSON)

    return router


def parse(body: bytes) -> tuple[Fields, bool]:
    """The fields of a request, which are passed on as they are, and whether its answer is to be streamed.

    Raises:
        Refused: it is none.
    """
    try:
        body.decode()
        fields = msgspec.json.decode(body, type=Fields)
        messages, stream = (msgspec.json.decode(fields.get(name, b"null")) for name in ("messages", "stream"))
    except msgspec.ValidationError:
        raise Refused(400, "the body is no JSON object") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refused(400, "the body is not JSON; NaN and infinity are not") from None
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "`messages` is no list of messages", param="messages")
    if not isinstance(stream, bool | None):
        raise Refused(400, "`stream` is neither true nor false", param="stream")
    return {**fields, "stream": msgspec.Raw(b"true" if stream else b"false")}, bool(stream)


class Places:
    """How many requests the server LLM has at once, and who waits to be one of them.

    Args:
        count: of places. As many requests wait for `QUEUE_SECONDS`.
    """

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._count = count
        self._waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of them, for a block.

        Raises:
            Refused: all are taken, and too many wait, or nobody left in time.
        """
        if self._free.locked() and self._waiting >= self._count:
            raise _busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise _busy() from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()


class _Passed(Response):
    """Passes a request on when there is a place for it, and the answer back; both end when the client goes away."""

    def __init__(self, upstream: Endpoint, places: Places, fields: Fields, stream: bool) -> None:
        self.background = None
        self._upstream, self._places = upstream, places
        self._fields, self._streamed = fields, stream

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await _unless_gone(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        async with self._places.place():
            try:
                if self._streamed:
                    await self._stream(send)
                else:
                    whole = await self._upstream.whole(self._fields)
                    await Response(whole, media_type=JSON)(scope, receive, send)
            except UpstreamError as e:
                raise _refused(e) from e

    async def _stream(self, send: Send) -> None:
        """The head is sent with the first event: what goes wrong before still has a status of its own."""
        async with aclosing(self._upstream.events(self._fields)) as events:
            data = await anext(events)
            headers = [(b"content-type", EVENTS.encode()), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await _send(send, data)
                async for data in events:
                    await _send(send, data)
                await _send(send, DONE, more=False)
            except UpstreamError as e:
                await _send(send, msgspec.json.encode(_refused(e).content), more=False)


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end, or until the client goes away. Raises Gone."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        await working
    finally:
        watching.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working  # to its end, so that its place is free


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_page(request: HttpRequest) -> None:
    if "origin" in request.headers:
        raise Refused(403, "this service answers no pages, unless it is served with a key")


def _refused(error: UpstreamError) -> Refused:
    """How it is told to a client. The log has no word of what the server LLM said: it may quote what it was asked."""
    if error.kind != "refused":
        _log.warning("%s", error.problem if not error.do else f"{error.problem}; {error.do}")
    code = error.code if error.kind == "refused" else _CODES[error.status]
    refused = Refused(error.status, error.what, param=error.param, code=code)
    if error.wait is not None:
        refused.headers["Retry-After"] = str(math.ceil(error.wait))
    return refused


def _busy() -> Refused:
    refused = Refused(503, "busy: the server LLM has no room now; try again later", code="busy")
    refused.headers["Retry-After"] = str(BUSY_SECONDS)
    return refused


def _none() -> Refused:
    return Refused(404, "this service has no server LLM: start it with --upstream", code="no_upstream")


_REQUEST = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        "stream": {"type": ["boolean", "null"]},
    },
    "required": ["messages"],
}
_ANSWER = {
    JSON: {"schema": {"type": "object", "required": ["choices"]}},
    EVENTS: {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string", "description": "a chunk as JSON; at last [DONE]"}},
            "required": ["data"],
        }
    },
}
