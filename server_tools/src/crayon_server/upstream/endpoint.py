"""An OpenAI-compatible endpoint of a server LLM, asked from an event loop. It may be down, slow, busy, broken or hostile.

Redirects are not followed, nothing is decompressed, no cookie is kept; every answer has a deadline and a largest size. What failed for a
moment is tried again, as long as nothing of the answer was handed on.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from crayon_runtime._version import __version__
from crayon_runtime.address import checked_key, checked_url
from crayon_runtime.download import plain
from crayon_server.upstream.errors import MODEL_NOT_FOUND, UpstreamError, late
from crayon_server.upstream.reply import EVENTS, JSON, Completion, Reply, decoded

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
FIRST_BYTE_SECONDS = 120.0
"""An answer that is not streamed has no byte before all of it was computed."""
IDLE_SECONDS = 30.0
DEADLINE_SECONDS = 600.0
RETRIES = 3
BACK_OFF = 0.5
"""Seconds before the first retry, doubled before each further one. Up to half of it is left out at random, so that not all come at once."""
PATIENCE = 60.0
"""Seconds that may pass between the tries of one answer, all in all."""

_LARGEST_LIST = 1 << 20

T = TypeVar("T")


class _Model(Struct):
    id: Annotated[str, Meta(min_length=1, max_length=256)]


class _Models(Struct):
    data: Annotated[list[_Model], Meta(min_length=1)]


class Endpoint:
    """A server LLM. For one event loop.

    Args:
        url: to which /v1/chat/completions is appended, also if it ends in /v1 already.
        model: its name there; None: the first that is listed.
        api_key: sent as `Authorization: Bearer`.
        plain_http: allow http to other machines, where everybody on the way can read what is asked.
        connect_timeout: seconds.
        first_byte_timeout: seconds from a request to the first byte of its answer.
        idle_timeout: seconds without a byte after that.
        deadline: seconds for one answer, retries included.
        retries: how often it is asked once more.
        patience: seconds that may pass between the tries of one answer, all in all.
        on_try: told after each try what came of it, "answered", "gone" if who asked went away, or what an `UpstreamError` is; and how many
            seconds it took until the first byte of the answer, or until it failed.

    Raises:
        InvalidInput: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        plain_http: bool = False,
        connect_timeout: float = CONNECT_SECONDS,
        first_byte_timeout: float = FIRST_BYTE_SECONDS,
        idle_timeout: float = IDLE_SECONDS,
        deadline: float = DEADLINE_SECONDS,
        retries: int = RETRIES,
        patience: float = PATIENCE,
        on_try: Callable[[str, float], object] = lambda *_: None,
    ) -> None:
        exposed = "everybody on the way could read what the server LLM is asked"
        checked, self._direct = checked_url(url, plain_http=plain_http, exposed=exposed)
        self.url = checked.removesuffix("/v1")
        self.on_try = on_try
        self._given = model
        self._listed: str | None = None
        self._headers = {"Accept-Encoding": "identity", "User-Agent": f"crayon-edge/{__version__}"}
        if checked_key(api_key) is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect, self._first, self._idle = connect_timeout, first_byte_timeout, idle_timeout
        self._deadline, self._retries, self._patience = deadline, retries, patience
        self._client: httpx.AsyncClient | None = None

    async def model(self) -> str:
        """The name of the model that answers.

        Raises:
            UpstreamError: no name was given, and the server LLM lists none.
        """
        if self._given is not None:
            return self._given
        if self._listed is None:
            self._listed = await self._retried(self._first_model)
        return self._listed

    async def complete(self, prompt: str, *, max_tokens: int, temperature: float) -> str:
        """The answer to one message of the user, whole.

        Raises:
            UpstreamError: there is none.
        """
        messages = [{"role": "user", "content": prompt}]
        content = await self._content({"messages": messages, "max_tokens": max_tokens, "temperature": temperature})
        _, completion = await self._retried(lambda end: self._completion(content, end))
        assert completion.choices
        return completion.choices[0].message.content or ""

    async def whole(self, request: Mapping[str, Any]) -> bytes:
        """Ask, and wait for the end.

        Args:
            request: the fields of a chat completion that is not streamed; `model` is set here.

        Returns:
            A chat completion as JSON, as it came.

        Raises:
            UpstreamError: there is none.
        """
        content = await self._content(request)
        body, _ = await self._retried(lambda end: self._completion(content, end))
        return body

    async def events(self, request: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """Ask, and take the answer as it comes. Closing the generator stops the server LLM.

        Args:
            request: the fields of a chat completion that is streamed; `model` is set here.

        Yields:
            The data of each event: a chunk of a chat completion as JSON, in one line. The answer is complete when there are no more; [DONE]
            is not among them.

        Raises:
            UpstreamError: there is no answer, or it was cut off.
        """
        content = await self._content(request)
        first, events = await self._retried(lambda end: self._begun(content, end))
        async with aclosing(events):
            yield first
            async for data in events:
                yield data

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _content(self, request: Mapping[str, Any]) -> bytes:
        return msgspec.json.encode({**request, "model": await self.model()})

    async def _retried(self, attempt: Callable[[float], Awaitable[T]]) -> T:
        """What the first attempt that succeeds returns. Each is told by which time of the event loop it must."""
        now = asyncio.get_running_loop().time
        end, waited = now() + self._deadline, 0.0
        for tries in itertools.count():
            try:
                return await attempt(end)
            except UpstreamError as e:
                pause = max(e.wait or 0.0, BACK_OFF * 2**tries * random.uniform(0.5, 1.0))
                waited += pause
                if not e.again or tries >= self._retries or waited > self._patience or now() + pause > end:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError

    async def _first_model(self, end: float) -> str:
        async with aclosing(await self._opened("GET", "models", None, JSON, end)) as reply:
            return decoded(await reply.whole(_LARGEST_LIST), _Models, self.url).data[0].id

    async def _completion(self, content: bytes, end: float) -> tuple[bytes, Completion]:
        async with aclosing(await self._opened("POST", "chat/completions", content, JSON, end)) as reply:
            return await reply.completion()

    async def _begun(self, content: bytes, end: float) -> tuple[bytes, AsyncGenerator[bytes, None]]:
        """The first event, and all others."""
        events = (await self._opened("POST", "chat/completions", content, EVENTS, end)).events()
        return await anext(events), events

    async def _opened(self, method: str, path: str, content: bytes | None, kind: str, end: float) -> Reply:
        """One try, up to the first byte of the answer."""
        now = asyncio.get_running_loop().time
        started, outcome = now(), "gone"
        try:
            by = min(end, started + self._first)
            response = await self._head(method, path, content, by)
            reply = Reply(response, self.url, first_by=by, idle=self._idle, end=end)
            try:
                await reply.begin(kind)
            except BaseException:
                await reply.aclose()
                raise
            outcome = "answered"
            return reply
        except UpstreamError as e:
            outcome = e.kind
            if e.code == MODEL_NOT_FOUND:
                self._listed = None  # it may have another one now
            raise
        finally:
            self.on_try(outcome, now() - started)

    async def _head(self, method: str, path: str, content: bytes | None, by: float) -> httpx.Response:
        """Send a request, and wait for the head of its answer."""
        import httpx

        if self._client is None:
            timeout = httpx.Timeout(None, connect=self._connect)
            # Where nothing will be encrypted, reading certificates would be 0.1 s for nothing.
            self._client = httpx.AsyncClient(
                headers=self._headers, timeout=timeout, trust_env=not self._direct, verify=not self._direct
            )
        headers = {"Content-Type": JSON} if content is not None else {}
        request = self._client.build_request(method, f"{self.url}/v1/{path}", headers=headers, content=content)
        try:
            async with asyncio.timeout_at(by):
                response = await self._client.send(request, stream=True)
        except httpx.ConnectTimeout:
            raise late("cannot be reached in time", self.url, again=True) from None
        except TimeoutError:
            raise late("did not answer in time", self.url) from None
        except httpx.RequestError as e:
            what = f"the server LLM cannot be reached: {plain(str(e)) or type(e).__name__}"
            raise UpstreamError(what, where=self.url, do="check its address, and that it runs", again=True) from None
        self._client.cookies.clear()
        return response
