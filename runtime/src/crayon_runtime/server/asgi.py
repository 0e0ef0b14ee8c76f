"""What any server of ours needs around its routes: who may ask, bodies of a bounded size, and a log that tells nothing of users."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.server.errors import Gone, Refused, refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LARGEST_BODY = 1 << 20
"""Bytes. A context of a hundred thousand tokens fits."""
BODY_SECONDS = 10.0

MOST_REQUESTS = 512
"""At once, of any kind. All others are told that the server is busy before anybody looks at what they want."""

CLIENT_GONE = 499
"""The status that is logged for it; nginx's."""

_log = logging.getLogger("crayon.server")


class Guard:
    """ASGI middleware: refuses pages of other origins, and logs each request and each failure, without a word of what was asked.

    A browser says where a page that asks comes from. If that is not this server, it is refused; so is, where only this machine is listened
    to, a Host that is not this machine: a name of an attacker's that he lets point to it (DNS rebinding).

    Args:
        loopback: only this machine is listened to.
    """

    def __init__(self, app: Application, *, loopback: bool) -> None:
        self._app = app
        self._loopback = loopback
        self._requests = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status, sent = CLIENT_GONE, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        self._requests += 1
        try:
            if self._requests > MOST_REQUESTS:
                await answer(Refused(503, "busy: too many connections", code="busy"), counted)
            elif self._is_foreign(scope["headers"]):
                await answer(
                    Refused(403, "this server answers programs of this machine and its own pages only"), counted
                )
            else:
                await self._app(scope, receive, counted)
        except Gone:
            pass
        except Exception as e:  # noqa: BLE001, it would be logged with its message
            log_failure(e)
            if status == CLIENT_GONE:
                await answer(refusal(e), counted)
        finally:
            self._requests -= 1
            _log.info(log_line(scope, status, sent, time.perf_counter() - started))

    def _is_foreign(self, headers: list[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        if len(hosts) != 1 or (self._loopback and not _names_this_machine(hosts[0])):
            return True
        return any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins)


async def answer(refused: Refused, send: Send) -> None:
    """Send an error, where there is no framework that would."""
    body = msgspec.json.encode(refused.content)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def log_line(scope: Message, status: int, sent: int, seconds: float) -> str:
    """A request as a line of JSON. Its address is logged as its route, so that even a wrong one says nothing."""
    line = {
        "method": scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "-",
        "route": getattr(scope.get("route"), "path", "-"),
        "status": status,
        "bytes": sent,
        "ms": round(1000 * seconds, 1),
    }
    return json.dumps(line)


def log_failure(error: BaseException) -> None:
    """Where it happened and what kind it is. Its message may hold what a user wrote, and is left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s\n%s", type(error).__name__, where)


def authorized(api_key: str | None) -> Callable[[HttpRequest], Awaitable[None]]:
    """A dependency of routes that need the key; None: they need none."""

    async def check(request: HttpRequest) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise Refused(
                401, "the API key is missing or wrong: send `Authorization: Bearer KEY`", code="invalid_api_key"
            )

    return check


async def read_body(request: HttpRequest, largest: int = LARGEST_BODY) -> bytes:
    """The body, if it is not larger than so many bytes and comes in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > largest:
                    raise Refused(413, f"the body is larger than {largest} bytes")
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


def read_key(path: Path) -> str:
    """The API key in a file."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput("the API key cannot be read", where=path, do="put one line of ASCII there") from e
    if not key.isprintable() or len(key) < 16:
        raise InvalidInput("the API key must be one line of at least 16 characters", where=path)
    return key


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 address is in brackets.

    Raises:
        InvalidInput: it is something else.
    """
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.port is not None and parts.netloc == text and "@" not in text:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise InvalidInput(
        f"{text!r} is not HOST:PORT",
        where="--serve",
        do="write for example 127.0.0.1:8080, or [::1]:8080; port 0 is any free one",
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OutputError: this machine has no such address, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as e:
        raise OutputError(
            f"this address cannot be listened on: {e.strerror}", where=f"{host}:{port}", do="choose another port"
        ) from e
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; without it, answers wait for 40 ms
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _names_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
