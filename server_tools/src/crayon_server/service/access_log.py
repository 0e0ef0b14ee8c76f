"""Around every request: what is logged and counted of it, and how slowly its answer may be read.

The log has one line of JSON for each request, which holds nothing that a user wrote and nothing of what a device sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crayon_server.service.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

STALL_SECONDS = 30.0
"""How much later than at `SLOWEST_READER` an answer may be read."""
SLOWEST_READER = 8 << 10
"""Bytes a second: 64 kbit/s."""

_log = logging.getLogger("crayon.service")


class _TooSlow(Exception):
    """The answer is read too slowly."""


class AccessLog:
    """ASGI middleware. Addresses are logged as their route, so that even a wrong one says nothing."""

    def __init__(self, app: Application, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status, sent, begun = 500, 0, 0.0

        async def counted(message: Message) -> None:
            nonlocal status, sent, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(begun + STALL_SECONDS + sent / SLOWEST_READER):
                    await send(message)
            except TimeoutError:
                raise _TooSlow from None
            sent += len(message.get("body", b""))

        try:
            await self._app(scope, receive, counted)
        except _TooSlow:  # the answer is cut off
            status = 499  # as nginx counts clients that are gone
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "-")
            self._metrics.answered(route, status, sent, seconds)
            line = {
                "method": scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "-",
                "route": route,
                "status": status,
                "bytes": sent,
                "ms": round(1000 * seconds, 1),
            }
            _log.info(json.dumps(line))
