"""One query and its answer over the network, in a thread of its own: a name that is not resolved holds up nobody."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, NamedTuple

from crayon_runtime._version import __version__
from crayon_runtime.download import plain, retry_after
from crayon_runtime.errors import ServerError
from crayon_runtime.routing.reply import Reply, message_of, reply_of

if TYPE_CHECKING:
    import ssl

    import httpx

BACK_OFF = 0.5
"""Seconds before the first retry; doubled before each further one. Where the server names a time, that counts."""

_LARGEST_ERROR = 4096
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_KEPT = 4  # connections
_KEPT_SECONDS = 60.0
_GRACE = 1.0  # seconds for the end mark, after the server said why it finished


class Limits(NamedTuple):
    """Of one exchange; see `ServerLLM`."""

    connect: float
    first_token: float
    idle: float
    deadline: float
    largest: int
    retries: int


class End:
    """The answer is whole."""


class Step(NamedTuple):
    """That something happened, and how long the next step may take."""

    allow: float
    """Seconds."""
    late: ServerError | None
    """What is wrong if it takes longer; None: nothing, the answer is whole."""
    text: str = ""


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Stale(Exception):
    """The server had closed a connection that was kept."""


class _Again(Exception):
    """An attempt that failed before there was an answer, in a way that another one may not."""

    def __init__(self, error: ServerError, wait: float | None = None) -> None:
        super().__init__(error.what)
        self.error, self.wait = error, wait


class Connection:
    """At most one connection to the server, and its socket, so that who waits for it can be woken."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.socket: socket.socket | None = None

    def cut(self) -> None:
        if self.socket is not None:
            with suppress(OSError):  # not that of an SSLSocket, which pulls the encryption from under who reads
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.client.close()


class Connections:
    """To one server. Those that are free are kept for further queries."""

    def __init__(self, url: str, *, api_key: str | None, direct: bool, limits: Limits) -> None:
        self.url, self.limits = url, limits
        self._direct = direct
        self._headers = {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"crayon-edge/{__version__}",
        }
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._free: list[Connection] = []
        self._ssl: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def take(self) -> Connection:
        """One that is kept, or a new one."""
        import httpx

        with self._lock:
            if self._free:
                return self._free.pop()
            if self._ssl is None and not self._direct:
                self._ssl = httpx.create_ssl_context()  # reads certificates, which takes a while
        return Connection(
            httpx.Client(
                headers=self._headers,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx.Timeout(self.limits.deadline, connect=self.limits.connect),
                limits=httpx.Limits(max_connections=1, keepalive_expiry=_KEPT_SECONDS),
                trust_env=not self._direct,
                verify=self._ssl or False,
            )
        )

    def keep(self, connection: Connection) -> None:
        with self._lock:
            if len(self._free) < _KEPT:
                self._free.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            free, self._free = self._free, []
        for connection in free:
            connection.close()


class Exchange:
    """One query and its answer, in a thread of its own. It reports to `out`, and ends after the deadline even if nobody listens."""

    def __init__(self, connections: Connections, body: bytes) -> None:
        self.where = connections.url
        self.out: queue.SimpleQueue[Step | ServerError | End] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.sent_bytes = 0
        self.reply: Reply | None = None
        self._connections, self._limits, self._body = connections, connections.limits, body
        self._deadline = time.monotonic() + self._limits.deadline
        self._stopped = threading.Event()
        self._lock = threading.RLock()  # __del__ of an Asking may come while it is held
        self._connection: Connection | None = None
        self._connected = self._answered = self._text_began = False

    @property
    def first(self) -> Step:
        """How long it may take until the request is sent."""
        return self._step(self._limits.connect, "the server cannot be reached: no connection within {} s")

    def stop(self) -> None:
        """Wake whoever waits for the network, and send nothing more."""
        with self._lock:
            self._stopped.set()
            if self._connection is not None:
                self._connection.cut()

    def run(self) -> None:
        try:
            self._attempts()
            self.out.put(End())
        except ServerError as e:
            self.out.put(e)
        except _Stopped:
            pass
        except Exception as e:  # noqa: BLE001 - somebody waits for this thread, whatever happens in it
            self.give_up(e)
        finally:
            self.ended.set()

    def give_up(self, error: Exception) -> None:
        self.out.put(self._error(f"asking the server failed: {type(error).__name__}: {plain(str(error))}"))
        self.ended.set()

    def _attempts(self) -> None:
        tries = 0
        while True:
            try:
                self._attempt()
                return
            except _Stale:
                continue
            except _Again as again:
                pause = BACK_OFF * 2**tries if again.wait is None else again.wait
                if tries == self._limits.retries or pause > self._patience():
                    raise again.error from again.__cause__
            tries += 1
            self.out.put(self.first._replace(allow=pause + self._limits.connect))
            if self._stopped.wait(pause):
                raise _Stopped

    def _attempt(self) -> None:
        import httpx

        self._connected = self._answered = False
        self._take_connection()
        whole = False
        try:
            self._talk()
            whole = True
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as e:
            raise self._error(f"the server cannot be reached: {plain(str(e))}", do="check the network") from e
        except httpx.RequestError as e:
            if self._stopped.is_set():
                raise _Stopped from None
            if self._answered:
                self._cut_off(e)
            elif not self._connected:
                raise _Stale from e
            else:
                raise _Again(self._error(f"the connection failed: {plain(str(e))}", do="try again later")) from e
        finally:
            self._leave_connection(keep=whole)

    def _take_connection(self) -> None:
        connection = self._connections.take()
        with self._lock:
            self._connection = connection

    def _leave_connection(self, *, keep: bool) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            assert connection is not None
            keep = keep and not self._stopped.is_set()
        if keep:
            self._connections.keep(connection)
        else:
            connection.close()

    def _talk(self) -> None:
        assert self._connection is not None
        with self._connection.client.stream(
            "POST", f"{self.where}/v1/chat/completions", content=self._body, extensions={"trace": self._trace}
        ) as response:
            self._answered = True
            if response.status_code != 200:
                raise self._refusal(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self._error("the server sends what was not asked for: compressed data")
            self.reply = reply_of(response.headers.get("content-type", ""), where=self.where)
            self._read(response, self.reply)

    def _read(self, response: httpx.Response, reply: Reply) -> None:
        if int(response.headers.get("content-length", "0")) > self._limits.largest:
            raise self._too_much()
        size = 0
        for content in response.iter_raw():
            size += len(content)
            if size > self._limits.largest:
                raise self._too_much()
            if time.monotonic() > self._deadline:
                raise self._late()
            if not reply.done:
                self._tell(reply.feed(content), reply)
                if reply.done:
                    self.out.put(End())
        if not reply.done:
            self._tell(reply.end(), reply)

    def _tell(self, pieces: list[str], reply: Reply) -> None:
        """An empty piece gives no more time to the first text, but to what follows it."""
        for text in pieces:
            if text or self._text_began:
                self._text_began = True
                self.out.put(self._step(self._limits.idle, "the answer stopped for {} s", text))
        if pieces and reply.finish_reason is not None:
            self.out.put(Step(_GRACE, None))

    def _cut_off(self, error: Exception) -> None:
        """What came may be all that there was."""
        if self.reply is None or not (self.reply.done or self.reply.finish_reason):
            raise self._error("the answer was cut off", do="try again later") from error

    def _refusal(self, response: httpx.Response) -> Exception:
        status, said = response.status_code, self._said(response)
        if status in _TRANSIENT:
            wait = retry_after(response.headers.get("retry-after"))
            later = "try again later" if wait is None else f"try again in {wait:.0f} s"
            return _Again(self._error(f"the server cannot answer now: {said}", do=later), wait)
        if response.is_redirect:
            to = plain(response.headers.get("location", "elsewhere"))
            return self._error(f"the server redirects to {to}", do="give that address, if you trust it")
        if status in (401, 403):
            return self._error(f"the server refuses: {said}", do="give the key of this server in a file")
        if status in (404, 405):
            return self._error(f"there is no such server or model: {said}", do="check the address and the model's name")
        return self._error(f"the server refuses: {said}")

    def _said(self, response: httpx.Response) -> str:
        content = b""
        for part in response.iter_raw():
            content += part
            if len(content) > _LARGEST_ERROR:
                break
        said = message_of(content[:_LARGEST_ERROR])
        return f"HTTP status {response.status_code}" if said is None else f"{said} ({response.status_code})"

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx. What it raises ends the request: also one that began to connect before it was stopped."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                assert self._connection is not None
                self._connected = True
                self._connection.socket = info["return_value"].get_extra_info("socket")
                if self._stopped.is_set():
                    self._connection.cut()
                    raise _Stopped
        elif event == "http11.send_request_headers.started" and info["request"].method == b"POST":
            with self._lock:
                if self._stopped.is_set():
                    raise _Stopped
                self.sent_bytes += len(self._body)
            self.out.put(self._step(self._limits.first_token, "no answer began within {} s"))

    def _step(self, allow: float, late: str, text: str = "") -> Step:
        """With what is wrong if it takes longer, which may also be the deadline."""
        left = self._deadline - time.monotonic()
        if left < allow:
            return Step(left, self._late(), text)
        return Step(allow, self._error(late.format(f"{allow:g}"), do="try again when the network is better"), text)

    def _patience(self) -> float:
        """Seconds that a retry is worth waiting for."""
        return min(self._limits.first_token, self._deadline - time.monotonic())

    def _late(self) -> ServerError:
        return self._error(f"the answer did not end within {self._limits.deadline:g} s", do="ask for a shorter one")

    def _too_much(self) -> ServerError:
        return self._error(
            f"the server sends more than {self._limits.largest} bytes",
            do="do not use this server; it is broken or hostile",
        )

    def _error(self, what: str, *, do: str | None = None) -> ServerError:
        return ServerError(what, where=self.where, do=do)
