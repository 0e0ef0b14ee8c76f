"""Around every request: what is logged and counted of it, and how slowly its answer may be read.

The log has one line of JSON for each request, which holds nothing that a user wrote and nothing of what a device sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from crayon_runtime.server.asgi import CLIENT_GONE, Application, Message, Receive, Send, log_line
from crayon_runtime.server.errors import Gone

if TYPE_CHECKING:
    from crayon_server.service.metrics import Metrics

STALL_SECONDS = 30.0
"""How much longer than at `SLOWEST_READER` it may take to read an answer. What it takes to make it is not counted."""
SLOWEST_READER = 8 << 10
"""Bytes a second: 64 kbit/s."""

_log = logging.getLogger("crayon.service")


class AccessLog:
    """ASGI middleware."""

    def __init__(self, app: Application, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status, sent, waited = 500, 0, 0.0

        async def counted(message: Message) -> None:
            nonlocal status, sent, waited
            status = message.get("status", status)
            before = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(before + STALL_SECONDS + sent / SLOWEST_READER - waited):
                    await send(message)
            except TimeoutError:
                raise Gone from None
            waited += asyncio.get_running_loop().time() - before
            sent += len(message.get("body", b""))

        try:
            await self._app(scope, receive, counted)
        except Gone:  # or reads too slowly: the answer is cut off
            status = CLIENT_GONE
        finally:
            seconds = time.perf_counter() - start
            self._metrics.answered(getattr(scope.get("route"), "path", "-"), status, sent, seconds)
            _log.info(log_line(scope, status, sent, seconds))
