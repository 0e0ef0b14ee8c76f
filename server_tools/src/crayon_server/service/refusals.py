"""How the service refuses: in its own form, and in OpenAI's where OpenAI's clients ask."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from crayon_runtime.errors import CrayonError, InvalidInput
from crayon_runtime.server import errors

OPENAI = ("/v1/chat/completions", "/v1/models")
"""Where OpenAI's protocol is spoken."""

_log = logging.getLogger("crayon.service")


class Refused(errors.Refused):
    """A request that is answered with an error.

    Args:
        where: the field of the request that is at fault.
        wait: seconds after which to ask again.
        code: for OpenAI's clients.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        where: str | None = None,
        do: str | None = None,
        wait: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(status, what, param=where, code=code)
        self.do = do
        if wait is not None:
            self.headers["Retry-After"] = str(wait)


def install(app: FastAPI) -> None:
    """Let an application answer whatever is raised in it."""
    for status, what in ((404, "there is nothing at this address"), (405, "this method is not for this address")):
        app.add_exception_handler(status, _always(status, what))
    app.add_exception_handler(Exception, _always(500, "the service failed; its log says more"))
    app.add_exception_handler(errors.Refused, _refused)
    app.add_exception_handler(CrayonError, _failed)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of refusals in our form."""
    text = {"type": ["string", "null"]}
    return _described(statuses, {"what": {"type": "string"}, "where": text, "do": text})


def described_as_openai(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of refusals in OpenAI's form."""
    text = {"type": ["string", "null"]}
    return _described(
        statuses, {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    )


def _described(statuses: tuple[int, ...], fields: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    error = {"type": "object", "properties": fields, "required": list(fields)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    return {s: {"description": "refused", "content": {"application/json": {"schema": schema}}} for s in statuses}


Handler = Callable[[HttpRequest, Exception], Awaitable[Response]]


def _answer(request: HttpRequest, refused: errors.Refused) -> Response:
    error, do = refused.content["error"], getattr(refused, "do", None)
    if request.scope["path"] not in OPENAI:
        error = {"what": error["message"], "where": error["param"], "do": do}
    elif do:
        error = {**error, "message": f"{error['message']}; {do}"}
    return JSONResponse({"error": error}, refused.status, refused.headers)


def _always(status: int, what: str) -> Handler:
    async def handle(request: HttpRequest, error: Exception) -> Response:
        answer = _answer(request, errors.Refused(status, what))
        answer.headers.update(getattr(error, "headers", None) or {})
        return answer

    return handle


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, errors.Refused)
    return _answer(request, error)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    """What the library refuses is the client's fault if it is its input, and otherwise no business of the client."""
    assert isinstance(error, CrayonError)
    if isinstance(error, InvalidInput):
        return _answer(request, Refused(422, error.what, where=error.where, do=error.do))
    _log.error("the adapter could not be made: %s", error)
    return _answer(request, Refused(503, "the adapter could not be made", do="try again later"))
