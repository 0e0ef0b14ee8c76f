"""Run the server of an engine, until it is interrupted."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_SECONDS = 5
"""For what is still being sent at the end."""


class Server(uvicorn.Server):
    """uvicorn for one application of `create_app`: when it is told to stop, what runs is ended, and who waits is told so."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self._answers = app.state.answers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._answers.stop()
        await super().shutdown(sockets)


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer until SIGINT, which is raised again at the end, or SIGTERM, which ends the process.

    Args:
        app: from `create_app`.
        listening: a socket that listens.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("crayon.server").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    Server(app).run([listening])
