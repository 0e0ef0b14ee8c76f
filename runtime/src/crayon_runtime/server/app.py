"""The application of the device's server.

    GET  /                         a page for people; needs no key, and tells nothing
    GET  /healthz                  no key needed
    GET  /v1/models                the base and its adapters
    GET  /v1/models/{model}
    POST /v1/chat/completions      messages, in the model's chat template
    POST /v1/completions           a text or token ids, continued as they are
    POST /v1/embeddings            the mean tapped hidden state of texts, of the un-customized model
    …    /v1/customization         see `crayon_runtime.server.customizing`

They speak OpenAI's protocol, whose clients work with them. Whatever is refused is answered with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from crayon_runtime._version import __version__
from crayon_runtime.customize import state_folder
from crayon_runtime.errors import CrayonError, InvalidInput
from crayon_runtime.server import customizing, replies, work
from crayon_runtime.server.answers import Answers
from crayon_runtime.server.asgi import Guard, authorized, log_failure, read_body
from crayon_runtime.server.customizing import Customizer, customization_routes
from crayon_runtime.server.errors import Refused, refusal
from crayon_runtime.server.models import HYBRID, Models
from crayon_runtime.server.page import page_response
from crayon_runtime.server.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    components,
    parse,
)
from crayon_runtime.server.responses import JSON, Reply, Streamed, Whole, described, json_response

if TYPE_CHECKING:
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import AdapterLike, GenerateOptions
    from crayon_runtime.routing.router import Router

WAITING = 16
CONVERSATIONS = 2


def create_app(
    engine: Engine,
    *,
    customized: Path | None = None,
    adapter: AdapterLike | None = None,
    defaults: GenerateOptions | None = None,
    router: Router | None = None,
    customizer: Customizer | None = None,
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
        router: of the same engine, for the model `hybrid`, which is there if it has a server to ask.
        customizer: of the same engine and folder; None: one that cannot customize.
        waiting: how many requests may wait for their turn.
        conversations: how many KV caches are kept.
        api_key: what clients have to send as `Authorization: Bearer`; None: nothing.
        loopback: it is listening to this machine only, and refuses requests that name another one.

    Raises:
        CrayonError: the engine, the adapter or a default cannot be used.
    """
    if engine.bundle is None:
        raise InvalidInput("an engine without a bundle cannot be served", do="make it with Engine.load")
    folder = customized or state_folder(engine.bundle.path)
    hybrid = router if router is not None and router.server is not None else None
    models = Models(engine, folder, adapter, hybrid=hybrid is not None)
    engine.stream([0], **(defaults or {}))  # refuses what it cannot do
    answers = Answers(engine, waiting=waiting, conversations=conversations)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        answers.stop()
        await asyncio.to_thread(answers.close)

    app = FastAPI(title="Crayon", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.answers = answers
    app.add_middleware(Guard, loopback=loopback)
    for status, what in ((404, "there is nothing at this address"), (405, "this method is not for this address")):
        app.add_exception_handler(status, _plain(status, what))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(CrayonError, _refused)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return page_response()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers, and with which model."""
        return {"status": "ok", "model": models.base}

    guard = [Depends(authorized(api_key))]
    app.include_router(_model_routes(models), dependencies=guard)
    app.include_router(_answer_routes(engine, models, answers, defaults or {}, hybrid), dependencies=guard)
    app.include_router(customization_routes(customizer or Customizer(engine, folder)), dependencies=guard)
    app.openapi = lambda: _openapi(app, engine, models)  # type: ignore[method-assign]
    return app


def _model_routes(models: Models) -> APIRouter:
    routes = APIRouter()

    def told(name: str) -> replies.Model:
        return replies.Model(name, models.created, None if name == models.base else models.base)

    @routes.get("/v1/models", **described(replies.ModelList, 401))
    def list_models() -> Response:
        """The base model, and each adapter as a model of its own."""
        return json_response(replies.ModelList([told(name) for name in models.names()]))

    @routes.get("/v1/models/{model:path}", **described(replies.Model, 401, 404))
    def show_model(model: str) -> Response:
        """One of them."""
        if model not in models.names():
            raise models.unknown(model)
        return json_response(told(model))

    return routes


def _answer_routes(
    engine: Engine, models: Models, answers: Answers, defaults: GenerateOptions, hybrid: Router | None
) -> APIRouter:
    routes = APIRouter()
    refused = (400, 401, 404, 408, 413, 500, 503)

    @routes.post("/v1/chat/completions", **described(replies.ChatCompletion, *refused, body=ChatRequest, events=True))
    async def chat(request: HttpRequest) -> Response:
        """Answer a conversation."""
        body = parse(await read_body(request), ChatRequest)
        routed = body.model == HYBRID and hybrid is not None
        written = replies.chat_writer(body, engine.tokenizer, models.fingerprint, hybrid=routed)
        if hybrid is not None and routed:
            todo = work.hybrid(engine, models, hybrid, body, defaults)
        else:
            todo = work.completion(engine, models, body, defaults)
        return (Streamed if body.stream else Whole)(answers, todo, written)

    @routes.post("/v1/completions", **described(replies.Completion, *refused, body=CompletionRequest, events=True))
    async def complete(request: HttpRequest) -> Response:
        """Continue a text."""
        body = parse(await read_body(request), CompletionRequest)
        written = replies.text_writer(body, engine.tokenizer, models.fingerprint)
        todo = work.completion(engine, models, body, defaults)
        return (Streamed if body.stream else Whole)(answers, todo, written)

    @routes.post("/v1/embeddings", **described(replies.Embeddings, *refused, body=EmbeddingRequest))
    async def embed(request: HttpRequest) -> Response:
        """The mean tapped hidden state of each text."""
        body = parse(await read_body(request), EmbeddingRequest)
        return Reply(answers, work.embeddings(engine, models, body))

    return routes


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


def _openapi(app: FastAPI, engine: Engine, models: Models) -> dict[str, Any]:
    """The description of this server as it is now: with the names of its models."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies = (ChatRequest, CompletionRequest, EmbeddingRequest)
    answered = (replies.ChatCompletion, replies.Completion, replies.Embeddings, replies.Model, replies.ModelList)
    schemas = components([*bodies, *answered, *customizing.SCHEMAS])
    own = [name for name in models.names() if name != HYBRID or not models.hybrid]
    for body, names in ((ChatRequest, models.names()), (CompletionRequest, own), (EmbeddingRequest, [models.base])):
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
