"""The routes of the device's server.

    GET  /healthz                  no key needed
    GET  /v1/models                the base and its adapters
    GET  /v1/models/{model}
    POST /v1/chat/completions      messages, in the model's chat template
    POST /v1/completions           a text or token ids, continued as they are
    POST /v1/embeddings            the mean tapped hidden state of texts, of the un-customized model

They speak OpenAI's protocol, whose clients work with them. Whatever is refused is answered with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from msgspec import Struct

from crayon_runtime._version import __version__
from crayon_runtime.customize import state_folder
from crayon_runtime.errors import CrayonError, InvalidInput, MissingExtra
from crayon_runtime.generation import Piece
from crayon_runtime.request import prompt_ids
from crayon_runtime.server import replies
from crayon_runtime.server.answers import Answers, Receive, Sessions, Work
from crayon_runtime.server.asgi import Guard, Message, Send, authorized, log_failure, read_body
from crayon_runtime.server.errors import Refused, refusal
from crayon_runtime.server.models import Models
from crayon_runtime.server.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    components,
    parse,
)

if TYPE_CHECKING:
    from crayon_runtime.constraint import Constraint
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import AdapterLike, GenerateOptions, Generation

WAITING = 16
CONVERSATIONS = 2
SCHEMAS = 32
"""Of `response_format`, kept for further requests."""

SEND_SECONDS = 30.0
"""A client that takes nothing for so long is given up."""

JSON, EVENTS = "application/json", "text/event-stream"


def create_app(
    engine: Engine,
    *,
    customized: Path | None = None,
    adapter: AdapterLike | None = None,
    defaults: GenerateOptions | None = None,
    waiting: int = WAITING,
    conversations: int = CONVERSATIONS,
    api_key: str | None = None,
    loopback: bool = True,
) -> FastAPI:
    """The server of one engine, as an ASGI application, with its `Answers` as `app.state.answers`.

    Args:
        engine: loaded from a bundle; whoever loaded it closes it.
        customized: the folder where `crayon customize` keeps its adapter; None: `state_folder` of the bundle.
        adapter: one more to answer with, under its own name.
        defaults: what a request that does not say otherwise is answered with.
        waiting: how many requests may wait for their turn.
        conversations: how many KV caches are kept.
        api_key: what clients have to send as `Authorization: Bearer`; None: nothing.
        loopback: it is listening to this machine only, and refuses requests that name another one.

    Raises:
        CrayonError: the engine, the adapter or a default cannot be used.
    """
    if engine.bundle is None:
        raise InvalidInput("an engine without a bundle cannot be served", do="make it with Engine.load")
    models = Models(engine, customized or state_folder(engine.bundle.path), adapter)
    engine.stream([0], **(defaults or {}))  # refuses what it cannot do
    answers = Answers(engine, waiting=waiting, conversations=conversations)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        answers.stop()
        answers.close()

    app = FastAPI(title="Crayon", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.answers = answers
    app.add_middleware(Guard, loopback=loopback)
    for status, what in ((404, "there is nothing at this address"), (405, "this method is not for this address")):
        app.add_exception_handler(status, _plain(status, what))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(CrayonError, _refused)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers, and with which model."""
        return {"status": "ok", "model": models.base}

    guard = [Depends(authorized(api_key))]
    app.include_router(_model_routes(models), dependencies=guard)
    app.include_router(_answer_routes(engine, models, answers, defaults or {}), dependencies=guard)
    app.openapi = lambda: _openapi(app, engine, models)  # type: ignore[method-assign]
    return app


def _model_routes(models: Models) -> APIRouter:
    router = APIRouter()

    def told(name: str) -> replies.Model:
        return replies.Model(name, models.created, None if name == models.base else models.base)

    @router.get("/v1/models", **_described(replies.ModelList, 401))
    def list_models() -> Response:
        """The base model, and each adapter as a model of its own."""
        return _json(replies.ModelList([told(name) for name in models.names()]))

    @router.get("/v1/models/{model:path}", **_described(replies.Model, 401, 404))
    def show_model(model: str) -> Response:
        """One of them."""
        if model not in models.names():
            raise models.unknown(model)
        return _json(told(model))

    return router


def _answer_routes(engine: Engine, models: Models, answers: Answers, defaults: GenerateOptions) -> APIRouter:
    router = APIRouter()
    refused = (400, 401, 404, 408, 413, 500, 503)

    def completion(request: ChatRequest | CompletionRequest) -> Response:
        written = replies.writer(request, engine.tokenizer, models.fingerprint)
        work = _completion(engine, models, request, defaults)
        return (_Stream if request.stream else _Whole)(answers, work, written)

    @router.post("/v1/chat/completions", **_described(replies.ChatCompletion, *refused, body=ChatRequest, events=True))
    async def chat(request: HttpRequest) -> Response:
        """Answer a conversation."""
        return completion(parse(await read_body(request), ChatRequest))

    @router.post("/v1/completions", **_described(replies.Completion, *refused, body=CompletionRequest, events=True))
    async def complete(request: HttpRequest) -> Response:
        """Continue a text."""
        return completion(parse(await read_body(request), CompletionRequest))

    @router.post("/v1/embeddings", **_described(replies.Embeddings, *refused, body=EmbeddingRequest))
    async def embed(request: HttpRequest) -> Response:
        """The mean tapped hidden state of each text."""
        body = parse(await read_body(request), EmbeddingRequest)
        return _Reply(answers, _embeddings(engine, models, body))

    return router


def _completion(
    engine: Engine, models: Models, request: ChatRequest | CompletionRequest, defaults: GenerateOptions
) -> Work:
    """The work of an answer: it yields pieces, if they are wanted, and then the generation."""

    def work(sessions: Sessions, cancel: threading.Event) -> Iterator[Any]:
        adapter = models.adapter(request.model)
        ids = request.ids(engine.tokenizer, engine.backend.vocab_size)
        options: GenerateOptions = {**request.options(defaults), "adapter": adapter, "cancel": cancel}
        if request.schema is not None:
            options["constraint"] = _constraint(request.schema)
        engine.stream(ids, **options)  # refuses what it cannot do, before it costs another conversation its session
        options["session"] = sessions.pick(ids, adapter)
        with engine.stream(ids, **options) as stream:
            for piece in stream:
                if request.stream:
                    yield piece
        if stream.generation.finish_reason != "cancelled":
            yield stream.generation

    return work


@functools.lru_cache(maxsize=SCHEMAS)
def _constraint(schema: str) -> Constraint:
    """To make one takes as long as several tokens."""
    from crayon_runtime.constraint import Constraint

    try:
        return Constraint.json_schema(schema)
    except MissingExtra as e:
        raise Refused(400, f"{e.what}; {e.do}", param="response_format", code="unsupported_parameter") from None


def _embeddings(engine: Engine, models: Models, request: EmbeddingRequest) -> Work:
    """The work of embeddings: it yields the reply.

    The prompt of an answer of one token is embedded on the way, in a session that is there anyway, and can be cancelled.
    """

    def work(sessions: Sessions, cancel: threading.Event) -> Iterator[Any]:
        if request.model != models.base:
            models.adapter(request.model)
            raise Refused(400, f"texts are embedded with the base model, {models.base!r}", param="model")
        prompts = [prompt_ids(text, engine.tokenizer, engine.backend.vocab_size).tolist() for text in request.texts]
        for ids in prompts:
            engine.stream(ids)
        data = []
        for i, ids in enumerate(prompts):
            session = sessions.pick(ids, None)
            done = engine.generate(ids, adapter=None, session=session, cancel=cancel, max_new_tokens=1)
            if done.prompt_tap is None:
                return
            exact = done.prompt_tap.astype("<f4")
            told = base64.b64encode(exact.tobytes()).decode() if request.encoding_format == "base64" else exact.tolist()
            data.append(replies.Embedding(i, told))
        count = sum(map(len, prompts))
        yield replies.Embeddings(data, models.base, replies.EmbeddingUsage(count, count))

    return work


class _Reply(Response):
    """Sends what the work yields, one object, as JSON."""

    def __init__(self, answers: Answers, work: Work) -> None:
        self.background = None
        self._answers = answers
        self._work = work

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async with self._answers.answer(self._work, receive) as running:
            (result,) = [item async for item in running]  # to its end, so that its slot is free when the client knows
        await _json(self.content(result))(scope, receive, send)

    def content(self, result: Any) -> Struct:
        return result  # type: ignore[no-any-return]


class _Whole(_Reply):
    """Sends an answer when it is complete."""

    def __init__(self, answers: Answers, work: Work, written: replies.ChatWriter | replies.TextWriter) -> None:
        super().__init__(answers, work)
        self._written = written

    def content(self, result: Generation) -> Struct:
        return self._written.whole(result)


class _Stream(_Whole):
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
                    data += b"".join(e for each in (item, *running.at_hand()) for e in self._events(each))
                    if data:
                        await _send(send, data)
                    data = b""
                    item = await anext(running)
            except StopAsyncIteration:
                data = b"data: [DONE]\n\n"
            except (Refused, CrayonError) as e:
                if not isinstance(e, Refused):
                    log_failure(e)
                data = replies.event(refusal(e).content)
            await _send(send, data, more=False)

    def _events(self, item: Any) -> Iterator[bytes]:
        return self._written.piece(item) if isinstance(item, Piece) else self._written.end(item)


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


def _json(content: Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type=JSON)


Handler = Callable[[HttpRequest, Exception], Any]


def _plain(status: int, what: str) -> Handler:
    async def handle(_request: HttpRequest, error: Exception) -> Response:
        content = msgspec.json.encode(Refused(status, what).content)
        return Response(content, status, getattr(error, "headers", None), JSON)

    return handle


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    refused = refusal(error)
    if refused.status >= 500 and not isinstance(error, Refused):
        log_failure(error)
    return Response(msgspec.json.encode(refused.content), refused.status, refused.headers, JSON)


def _described(
    reply: type[Struct], *refused: int, body: type[Struct] | None = None, events: bool = False
) -> dict[str, Any]:
    """What OpenAPI says of a route."""
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


def _openapi(app: FastAPI, engine: Engine, models: Models) -> dict[str, Any]:
    """The description of this server as it is now: with the names of its models."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies = (ChatRequest, CompletionRequest, EmbeddingRequest)
    answered = (replies.ChatCompletion, replies.Completion, replies.Embeddings, replies.Model, replies.ModelList)
    schemas = components([*bodies, *answered])
    for body in bodies:
        names = [models.base] if body is EmbeddingRequest else models.names()
        schemas[body.__name__]["properties"]["model"] = {"enum": names}
    text = {"type": "string", "minLength": 1}
    token = {"type": "integer", "minimum": 0, "maximum": engine.backend.vocab_size - 1}
    schemas[CompletionRequest.__name__]["properties"]["prompt"] = {
        "anyOf": [
            text,
            {"type": "array", "items": text, "minItems": 1, "maxItems": 1},
            {"type": "array", "items": token, "minItems": 1, "maxItems": engine.backend.context_length - 1},
        ]
    }
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return document
