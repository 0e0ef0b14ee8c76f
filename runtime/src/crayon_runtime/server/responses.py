"""How the work of a request becomes its response: whole, or event by event; and what OpenAPI says of both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
from fastapi.responses import Response
from msgspec import Struct

from crayon_runtime.errors import CrayonError
from crayon_runtime.server.answers import Answers, Receive, Work
from crayon_runtime.server.asgi import Message, Send, log_failure
from crayon_runtime.server.errors import Refused, refusal
from crayon_runtime.server.replies import event

SEND_SECONDS = 30.0
"""A client that takes nothing for so long is given up."""

JSON, EVENTS = "application/json", "text/event-stream"


class Writer(Protocol):
    """Writes one answer; see `crayon_runtime.server.replies`. The work yields its pieces, if they are wanted, and at last the result."""

    def whole(self, result: Any) -> Struct: ...

    def first(self) -> Iterator[bytes]: ...

    def events(self, item: Any) -> Iterator[bytes]: ...


class Reply(Response):
    """Sends what the work yields, one object, as JSON."""

    def __init__(self, answers: Answers, work: Work) -> None:
        self.background = None
        self._answers = answers
        self._work = work

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async with self._answers.answer(self._work, receive) as running:
            (result,) = [item async for item in running]  # to its end, so that its slot is free when the client knows
        await json_response(self.content(result))(scope, receive, send)

    def content(self, result: Any) -> Struct:
        return result  # type: ignore[no-any-return]


class Whole(Reply):
    """Sends an answer when it is complete."""

    def __init__(self, answers: Answers, work: Work, written: Writer) -> None:
        super().__init__(answers, work)
        self._written = written

    def content(self, result: Any) -> Struct:
        return self._written.whole(result)


class Streamed(Whole):
    """Sends an answer piece by piece, as server-sent events.

    The head is sent with the first piece: what goes wrong before still has a status of its own.
    """

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:  # noqa: ARG002
        async with self._answers.answer(self._work, receive) as running:
            item = await anext(running)
            headers = [(b"content-type", EVENTS.encode()), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            data = b"".join(self._written.first())
            try:
                while True:
                    data += b"".join(e for each in (item, *running.at_hand()) for e in self._written.events(each))
                    if data:
                        await _send(send, data)
                    data = b""
                    item = await anext(running)
            except StopAsyncIteration:
                data = b"data: [DONE]\n\n"
            except (Refused, CrayonError) as e:
                if not isinstance(e, Refused):
                    log_failure(e)
                data = event(refusal(e).content)
            await _send(send, data, more=False)


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


def json_response(content: Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type=JSON)


def described(
    reply: type[Struct], *refused: int, body: type[Struct] | None = None, events: bool = False
) -> dict[str, Any]:
    """What OpenAPI says of a route.

    Args:
        reply, body: whose schemas are among the document's components.
        refused: the statuses that it is refused with.
        events: it can be streamed.
    """
    content: dict[str, Any] = {JSON: {"schema": _ref(reply)}}
    if events:
        data = {"type": "string", "description": "a chunk as JSON; at last [DONE]"}
        content[EVENTS] = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    text = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text},
        "required": ["message", "type", "param", "code"],
    }
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    responses: dict[int, Any] = {s: {"description": "refused", "content": {JSON: {"schema": schema}}} for s in refused}
    extra = {"requestBody": {"required": True, "content": {JSON: {"schema": _ref(body)}}}} if body else {}
    return {
        "response_class": Response,
        "responses": {200: {"description": "answered", "content": content}, **responses},
        "openapi_extra": extra,
    }


def _ref(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
