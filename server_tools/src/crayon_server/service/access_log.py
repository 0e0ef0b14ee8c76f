"""One line of JSON for each request, which holds nothing that a user wrote and nothing of what a device sent."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_log = logging.getLogger("crayon.service")


class AccessLog:
    """ASGI middleware. Addresses are logged as their route, so that even a wrong one says nothing."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status, sent = 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            line = {
                "method": scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "-",
                "route": getattr(scope.get("route"), "path", "-"),
                "status": status,
                "bytes": sent,
                "ms": round(1000 * (time.perf_counter() - start), 1),
            }
            _log.info(json.dumps(line))
