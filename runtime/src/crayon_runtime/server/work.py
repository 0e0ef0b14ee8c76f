"""What is computed for a request, when its turn comes."""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from crayon_runtime.request import prompt_ids
from crayon_runtime.server.errors import Refused
from crayon_runtime.server.replies import Embedding, Embeddings, EmbeddingUsage
from crayon_runtime.server.tools import constraint

if TYPE_CHECKING:
    import threading

    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import GenerateOptions
    from crayon_runtime.routing.router import Reply, Router, Server
    from crayon_runtime.server.answers import Running, Work
    from crayon_runtime.server.models import Models
    from crayon_runtime.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest


def completion(
    engine: Engine, models: Models, request: ChatRequest | CompletionRequest, defaults: GenerateOptions
) -> Work:
    """An answer of the device: it yields pieces, if they are wanted, and then the generation."""

    def work(running: Running) -> Iterator[Any]:
        ids, options = _prepared(engine, running, request, models.adapter(request.model), defaults)
        with engine.stream(ids, **options) as stream:
            for piece in stream:
                if request.stream:
                    yield piece
        if stream.generation.finish_reason != "cancelled":
            yield stream.generation

    return work


def hybrid(engine: Engine, models: Models, router: Router, request: ChatRequest, defaults: GenerateOptions) -> Work:
    """An answer of the device or of the server LLM: it yields parts, if they are wanted, and then the router's answer.

    While the server is asked, the next request has its turn; the device is not held up by a network.
    """

    def work(running: Running) -> Iterator[Any]:
        ids, options = _prepared(engine, running, request, models.preferred(), defaults)
        own = copy.copy(router)
        if router.server is not None:
            own.server = _Aside(router.server, running, held="constraint" in options)
        with own.stream(ids, query=request.query, **options) as stream:
            for part in stream:
                if request.stream:
                    yield part
        if not running.cancel.is_set():
            yield stream.answer

    return work


def embeddings(engine: Engine, models: Models, request: EmbeddingRequest) -> Work:
    """Embeddings: it yields the reply.

    The prompt of an answer of one token is embedded on the way, in a session that is there anyway, and can be cancelled.
    """

    def work(running: Running) -> Iterator[Any]:
        if request.model != models.base:
            models.adapter(request.model)
            raise Refused(400, f"texts are embedded with the base model, {models.base!r}", param="model")
        prompts = [prompt_ids(text, engine.tokenizer, engine.backend.vocab_size).tolist() for text in request.texts]
        for ids in prompts:
            engine.stream(ids)
        data = []
        for i, ids in enumerate(prompts):
            session = running.sessions.pick(ids, None)
            done = engine.generate(ids, adapter=None, session=session, cancel=running.cancel, max_new_tokens=1)
            if done.prompt_tap is None:
                return
            exact = done.prompt_tap.astype("<f4")
            told = base64.b64encode(exact.tobytes()).decode() if request.encoding_format == "base64" else exact.tolist()
            data.append(Embedding(i, told))
        count = sum(map(len, prompts))
        yield Embeddings(data, models.base, EmbeddingUsage(count, count))

    return work


def _prepared(
    engine: Engine,
    running: Running,
    request: ChatRequest | CompletionRequest,
    adapter: Adapter | None,
    defaults: GenerateOptions,
) -> tuple[list[int], GenerateOptions]:
    """The prompt, and the options with a session to compute it in."""
    ids = request.ids(engine.tokenizer, engine.backend.vocab_size)
    options: GenerateOptions = {**request.options(defaults), "adapter": adapter, "cancel": running.cancel}
    if request.wanted:
        options["constraint"] = constraint(request.wanted)
    engine.stream(ids, **options)  # refuses what it cannot do, before it costs another conversation its session
    options["session"] = running.sessions.pick(ids, adapter)
    return ids, options


class _Aside:
    """A server that is asked by who steps aside.

    Args:
        held: the answer is checked when it is complete, and the device may have to go on then.
    """

    def __init__(self, server: Server, running: Running, *, held: bool) -> None:
        self._server, self._running, self._held = server, running, held

    @property
    def url(self) -> str:
        return self._server.url

    def request(self, query: str, *, max_tokens: int | None = None) -> bytes:
        return self._server.request(query, max_tokens=max_tokens)

    def ask(self, query: str, *, max_tokens: int | None = None, cancel: threading.Event | None = None) -> Reply:
        reply = self._server.ask(query, max_tokens=max_tokens, cancel=cancel)
        return _AsideReply(reply, self._running, held=self._held) if self._running.step_aside() else reply


class _AsideReply(Iterator[str]):
    """A reply that is waited for without a turn. Whoever has read it to its end needs no turn any more; all others take one again."""

    def __init__(self, reply: Reply, running: Running, *, held: bool) -> None:
        self.finish_reason: str | None = None
        self._reply, self._running = reply, running
        self._device_may_go_on = True
        self._held = held

    @property
    def tokens(self) -> int:
        return self._reply.tokens

    @property
    def sent_bytes(self) -> int:
        return self._reply.sent_bytes

    def __next__(self) -> str:
        try:
            return next(self._reply)
        except StopIteration:
            self.finish_reason = self._reply.finish_reason
            self._device_may_go_on = self._held
            raise

    def close(self) -> None:
        try:
            self._reply.close()
        finally:
            if self._device_may_go_on:
                self._device_may_go_on = False
                self._running.step_back()
