"""The server LLM, as a device asks it: one query goes up, pieces of text come down.

The server may be broken, slow or hostile. What it sends is bounded in size and in time, redirects are not followed, nothing is
decompressed, no cookie is kept. Whatever goes wrong is a ServerError.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Self

import msgspec

from crayon_runtime.address import checked_key, checked_url
from crayon_runtime.errors import InvalidInput, ServerError
from crayon_runtime.routing.exchange import Connections, End, Exchange, Limits, Step

_LARGEST_QUERY = 1 << 20
_DRAIN = 0.1  # seconds for what follows the end mark, so that the connection can be kept
_TICK = 0.05  # seconds between looks at what may cancel


class ServerLLM:
    """An endpoint with OpenAI's protocol. Any number of threads may ask at once; connections are kept for further queries.

    Args:
        url: its address, to which /v1/chat/completions is appended; https, or http to this machine.
        api_key: sent as `Authorization: Bearer`.
        model: its name there.
        connect_timeout: seconds to find the server and connect.
        first_token_timeout: seconds from there to the first text; for a server that does not stream, to all of it.
        idle_timeout: seconds between one part of the answer and the next.
        deadline: seconds that everything may take, retries included.
        largest: bytes of an answer as it is sent; more is refused.
        plain_http: allow http to other machines, where everybody on the way can read queries, answers and the key.
        retries: how often to ask again where the server is busy or cuts the connection before it answers.

    Raises:
        InvalidInput: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str = "default",
        connect_timeout: float = 3,
        first_token_timeout: float = 15,
        idle_timeout: float = 10,
        deadline: float = 60,
        largest: int = 1 << 20,
        plain_http: bool = False,
        retries: int = 1,
    ) -> None:
        address, direct = checked_url(
            url, plain_http=plain_http, exposed="everybody on the way could read what is asked and answered"
        )
        self.url = address.removesuffix("/v1")
        self.model = model
        self._limits = Limits(
            connect=connect_timeout,
            first_token=first_token_timeout,
            idle=idle_timeout,
            deadline=deadline,
            largest=largest,
            retries=retries,
        )
        self._connections = Connections(self.url, api_key=checked_key(api_key), direct=direct, limits=self._limits)

    def ask(self, query: str, *, max_tokens: int | None = None, cancel: threading.Event | None = None) -> Asking:
        """Send a query, and nothing else of the user's.

        Args:
            max_tokens: of the answer; None: as the server likes.
            cancel: ends the answer when it is set.

        Raises:
            InvalidInput: the query is empty, no text, or longer than 1 MiB.
        """
        return Asking(Exchange(self._connections, self.request(query, max_tokens=max_tokens)), cancel)

    def request(self, query: str, *, max_tokens: int | None = None) -> bytes:
        """What `ask` sends as the body of its request. Raises as `ask`."""
        if not query.strip():
            raise InvalidInput("there is nothing to ask", where="query")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": query}],
            "stream": True,
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            content = msgspec.json.encode(body)
        except UnicodeEncodeError:
            raise InvalidInput("the query is no text in Unicode", where="query") from None
        if len(content) > _LARGEST_QUERY:
            raise InvalidInput(f"the query is too long to send: {len(content)} bytes", where="query")
        return content

    def close(self) -> None:
        """Close the connections that are kept."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Asking:
    """An answer as it comes: iterate over its pieces of text. What else there is to know is there when it has ended.

    Raises, while it is iterated over:
        ServerError: the server is down, slow or busy, refuses, cuts the answer off, or sends something that is none. `text` is then
            what came before.
    """

    def __init__(self, exchange: Exchange, cancel: threading.Event | None) -> None:
        self.finish_reason: str | None = None
        """As the server says it, or "cancelled"."""
        self.seconds = 0.0
        """From the request to the end."""
        self.first_token_seconds: float | None = None
        """From the request to the first text."""
        self._pieces: list[str] = []
        self._exchange, self._cancel = exchange, cancel
        self._ended = False
        self._started = time.perf_counter()
        self._next = exchange.first
        self._due = time.monotonic() + self._next.allow
        try:
            threading.Thread(target=exchange.run, name="crayon-ask", daemon=True).start()
        except RuntimeError as e:  # there are too many, or the interpreter ends
            exchange.give_up(e)

    @property
    def text(self) -> str:
        """All that came so far."""
        return "".join(self._pieces)

    @property
    def tokens(self) -> int:
        """Of the answer: as the server counts them, or else how many pieces came."""
        reply = self._exchange.reply
        return len(self._pieces) if reply is None or reply.tokens is None else reply.tokens

    @property
    def sent_bytes(self) -> int:
        """Of the requests that left the device, retries included."""
        return self._exchange.sent_bytes

    def close(self) -> None:
        """Stop. The server sees that the connection is closed; nothing of the query is sent any more."""
        if not self._ended:
            self._end("cancelled")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while not self._ended:
            try:
                piece = self._piece()
            except BaseException:
                self._end(None)
                raise
            if piece:
                if not self._pieces:
                    self.first_token_seconds = time.perf_counter() - self._started
                self._pieces.append(piece)
                return piece
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._exchange.stop()

    def _piece(self) -> str:
        """The next one; empty where it has to be asked for again, and at the end."""
        if self._cancel is not None and self._cancel.is_set():
            self._end("cancelled")
            return ""
        came = self._wait()
        if came is None:
            return ""
        if isinstance(came, ServerError):
            raise came
        if isinstance(came, Step):
            self._next, self._due = came, time.monotonic() + came.allow
            return came.text
        self._finish()
        return ""

    def _wait(self) -> Step | ServerError | End | None:
        """What came; None: nothing yet."""
        left = max(self._due - time.monotonic(), 0.0)
        try:
            return self._exchange.out.get(timeout=left if self._cancel is None else min(left, _TICK))
        except queue.Empty:
            if time.monotonic() < self._due:
                return None
            if self._next.late is None:
                return End()
            return self._next.late

    def _finish(self) -> None:
        reply = self._exchange.reply
        self._exchange.ended.wait(_DRAIN)
        self._end(reply.finish_reason if reply else None)
        if not self.text.strip():
            raise ServerError("the server's answer is empty", where=self._exchange.where)

    def _end(self, finish_reason: str | None) -> None:
        if not self._ended:
            self._ended = True
            self._exchange.stop()
            self.finish_reason = finish_reason
            self.seconds = time.perf_counter() - self._started
