"""Customization from a page or a program of this machine: what it came to, what would leave the device, and doing it.

GET  /v1/customization             what the model is customized with, and whether it can be customized here
GET  /v1/customization/examples    the examples that it was customized with
POST /v1/customization/preview     examples: what customizing with them would send, byte for byte; nothing is sent
POST /v1/customization             examples: customize with them; answers of the server go on meanwhile
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from msgspec import Meta, Struct

from crayon_runtime.customize import customize, preview
from crayon_runtime.customized import check_serial, kept_examples, read_state
from crayon_runtime.errors import AdapterError, CrayonError, InvalidInput, ManifestError, OutputError
from crayon_runtime.pool import Pool
from crayon_runtime.remote import PoolClient
from crayon_runtime.server.asgi import log_failure, read_body
from crayon_runtime.server.errors import Refused
from crayon_runtime.server.requests import parse
from crayon_runtime.server.responses import described, json_response

if TYPE_CHECKING:
    from crayon_runtime.engine import Engine
    from crayon_runtime.tokenizer import Tokenizer

MOST_EXAMPLES = 1000

_Text = Annotated[str, Meta(min_length=1)]
Result = TypeVar("Result")


class Example(Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt as the model is given it, and how this user wants it answered."""

    prompt: _Text
    completion: _Text


class Examples(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/customization and its preview."""

    examples: Annotated[list[Example], Meta(min_length=1, max_length=MOST_EXAMPLES)]

    def pairs(self) -> list[tuple[str, str]]:
        return [(example.prompt, example.completion) for example in self.examples]


class KeptExamples(Struct, frozen=True):
    """Those that the model was customized with."""

    examples: list[Example]


class PoolName(Struct, frozen=True):
    name: str
    version: str


class Around(Struct, frozen=True):
    """What the chat template writes around a single message of the user, so that examples can be prompts as a chat makes them."""

    before: str
    after: str


class Status(Struct, frozen=True):
    """What the model is customized with."""

    customized: bool
    pool: PoolName | None
    alpha: list[float]
    log_loss: float | None
    """Of the answers in the examples, with the adapter; nats per token."""
    examples: int
    """How many there are."""
    possible: bool
    """Whether there is a pool to customize with."""
    to: str | None
    """The service that would be sent alpha; None: nothing would leave the device."""
    running: bool
    template: Around | None
    """None: a chat prompt cannot be written as plain text."""
    conversation: bool
    """Whether the model knows what was said before; otherwise it has no chat template, and continues single messages."""


class Preview(Struct, frozen=True):
    """What would leave the device: the body of one request."""

    to: str | None
    """None: nothing leaves it, as the pool is on the device. `body` is what a service would be sent."""
    body: str
    bytes: int


class Outcome(Struct, frozen=True):
    """What came of it; see `crayon_runtime.customize.Customization`."""

    installed: bool
    reason: str
    alpha: list[float]
    to: str | None
    sent: str
    """The body that was sent, or would have been."""
    sent_bytes: int
    received_bytes: int
    log_loss_base: float
    log_loss_before: float
    log_loss: float | None
    seconds: dict[str, float]


class Customizer:
    """Customizes one engine's model, one customization at a time.

    Args:
        folder: where the adapter is kept; see `crayon_runtime.customized`.
        pool: opens what to customize with; None: this server does not customize.
        to: the service that `pool` talks to; None: it is on this device.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        pool: Callable[[], AbstractContextManager[Pool | PoolClient]] | None = None,
        *,
        to: str | None = None,
    ) -> None:
        self._engine, self._folder = engine, folder
        self._pool, self._to = pool, to
        self._running = threading.Lock()

    def status(self) -> Status:
        """What the model is customized with now."""
        try:
            state = read_state(self._folder)
        except ManifestError:  # it is not, or not by a version that we know
            state = None
        return Status(
            customized=state is not None,
            pool=PoolName(state.pool_name, state.pool_version) if state else None,
            alpha=state.alpha if state else [],
            log_loss=state.log_loss if state else None,
            examples=len(self.examples()),
            possible=self._pool is not None,
            to=self._to,
            running=self._running.locked(),
            template=around(self._engine.tokenizer),
            conversation=self._engine.tokenizer.has_chat_template,
        )

    def examples(self) -> list[Example]:
        """Those that it was customized with."""
        try:
            return [Example(prompt, completion) for prompt, completion in kept_examples(self._folder)]
        except InvalidInput:
            return []

    def preview(self, examples: list[tuple[str, str]]) -> Preview:
        """What would leave the device."""
        with self._open() as pool:
            body = msgspec.json.encode(preview(self._engine, examples, pool))
        return Preview(self._to, body.decode(), len(body))

    def customize(self, examples: list[tuple[str, str]]) -> Outcome:
        """Customize, and answer with the new adapter from now on if it proved itself."""
        with self._open() as pool:
            if isinstance(pool, PoolClient):
                check_serial(pool.manifest, self._folder)
            done = customize(self._engine, examples, pool, folder=self._folder)
        return Outcome(
            installed=done.installed,
            reason=done.reason,
            alpha=done.alpha,
            to=self._to,
            sent=msgspec.json.encode(done.sent).decode(),
            sent_bytes=done.sent_bytes,
            received_bytes=done.received_bytes,
            log_loss_base=done.log_loss_base,
            log_loss_before=done.log_loss_before,
            log_loss=done.log_loss if done.log_loss == done.log_loss else None,
            seconds=done.seconds,
        )

    def _open(self) -> AbstractContextManager[Pool | PoolClient]:
        if self._pool is None:
            message = "there is no pool to customize with: start the server with --pool, or with --server"
            raise Refused(404, message, code="no_pool")
        return self._pool()

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Do it in a thread of its own, unless another one is at work. It goes on if nobody waits for it any more.

        Raises:
            Refused: another one is at work; or it fails.
        """
        if not self._running.acquire(blocking=False):
            raise Refused(409, "another customization is running; wait until it has ended", code="customizing")
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as e:  # noqa: BLE001, told to whoever waits
                errors.append(e)
            finally:
                self._running.release()
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=run, name="crayon-customize", daemon=True).start()
        await done.wait()
        if errors:
            raise _told(errors[0])
        return results[0]


def _told(error: BaseException) -> BaseException:
    """An error as a client is told of it: what is wrong with a pool or its service is for the user of this device."""
    if not isinstance(error, CrayonError) or isinstance(error, Refused):
        return error
    status = 400 if isinstance(error, InvalidInput | AdapterError) else 500 if isinstance(error, OutputError) else 502
    if status >= 500:
        log_failure(error)
    message = f"{error.what}; {error.do}" if error.do else error.what
    return Refused(status, message, param=error.where if status == 400 else None, code="customization_failed")


def around(tokenizer: Tokenizer) -> Around | None:
    """What surrounds a user's message; None if the template writes control tokens there, which plain text cannot say."""
    if not tokenizer.has_chat_template:
        return Around("", "")
    message = "message"
    try:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": message}])
    except InvalidInput:
        return None
    text = tokenizer.decode(ids)
    before, found, after = text.partition(message)
    return Around(before, after) if found and tokenizer.encode(text) == ids else None


def customization_routes(customizer: Customizer) -> APIRouter:
    """The routes, still without a guard."""
    router = APIRouter()
    refused = (400, 401, 404, 408, 409, 413, 500, 502)

    @router.get("/v1/customization", **described(Status, 401))
    def show() -> Response:
        """What the model is customized with, and whether it can be customized here."""
        return json_response(customizer.status())

    @router.get("/v1/customization/examples", **described(KeptExamples, 401))
    def examples() -> Response:
        """The examples that it was customized with; none if it is not."""
        return json_response(KeptExamples(customizer.examples()))

    @router.post("/v1/customization/preview", **described(Preview, *refused, body=Examples))
    async def foresee(request: HttpRequest) -> Response:
        """What customizing with these examples would send, byte for byte. Nothing is sent."""
        pairs = parse(await read_body(request), Examples).pairs()
        return json_response(await customizer.alone(lambda: customizer.preview(pairs)))

    @router.post("/v1/customization", **described(Outcome, *refused, body=Examples))
    async def perform(request: HttpRequest) -> Response:
        """Customize with these examples."""
        pairs = parse(await read_body(request), Examples).pairs()
        return json_response(await customizer.alone(lambda: customizer.customize(pairs)))

    return router


SCHEMAS: list[Any] = [Examples, KeptExamples, Outcome, Preview, Status]
"""What these routes take and give."""
