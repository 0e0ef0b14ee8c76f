"""A connection that is closed if no request comes: uvicorn waits for the first one without end, and counts who waits as open."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

FIRST_REQUEST_SECONDS = 10.0


class Connection(H11Protocol):
    """HTTP/1.1 whose first request has to be there, with its headers, after `FIRST_REQUEST_SECONDS`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._first = self.loop.call_later(FIRST_REQUEST_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._first.cancel()
        super().connection_lost(exc)

    def _too_late(self) -> None:
        if self.cycle is None:
            self.transport.abort()
