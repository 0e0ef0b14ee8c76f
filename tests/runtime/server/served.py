"""Servers over engines with the fake backend, and their clients: for everything that asks the device's server."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from crayon_runtime.server import create_app
from crayon_runtime.server.asgi import listen
from crayon_runtime.server.serve import Server
from tests.runtime import tiny
from tests.runtime.tiny import TOKENIZER

QUESTION = [{"role": "user", "content": "the alarm"}]
CHAT = {"model": "tiny", "messages": QUESTION}


class Served:
    """A server that listens, and clients of it."""

    def __init__(self, engine: Engine, app: Any, url: str) -> None:
        self.engine = engine
        self.answers = app.state.answers
        self.customizer: Any = None
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        self.chat = self.client.chat.completions.create

    def ask(self, text: str, **options: Any) -> Any:
        return self.chat(model="tiny", messages=[{"role": "user", "content": text}], **options)

    def all_cancelled(self) -> bool:
        return all(running.cancel.is_set() for running in self.answers._running)

    def wait(self, condition: Callable[[], bool]) -> None:
        wait(condition)

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def post(self, path: str, body: Any) -> socket.socket:
        """Send a request, and read nothing of the answer."""
        connection = self.connect()
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection


def body(connection: socket.socket) -> bytes:
    """Of the response that comes over a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.read()


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Served]:
    """Serve an engine, which is closed at the end."""
    app = create_app(engine, **options)
    with listen("127.0.0.1", 0) as listening:
        server = Server(app)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        served = Served(engine, app, f"http://127.0.0.1:{listening.getsockname()[1]}")
        try:
            wait(lambda: server.started)
            yield served
        finally:
            served.client.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            engine.close()


class Gate:
    """A script that says x, one token each time that the gate is opened."""

    def __init__(self) -> None:
        self.asked = self.said = 0
        self.prompts: list[str] = []
        self._open = threading.Semaphore(0)

    def __call__(self, ids: list[int], adapter: str | None) -> int:
        if len(ids) > 1 and ids[-1] != tiny.BYTE + ord("x"):
            self.prompts.append(TOKENIZER.decode(ids))
        self.asked += 1
        assert self._open.acquire(timeout=20)
        self.said += 1
        return tiny.BYTE + ord("x")

    def open(self, times: int = 1) -> None:
        self._open.release(times)


class Ask:
    """One request at a time to an application, without a network."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        async def send() -> Any:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    def chat(self, **changes: Any) -> Any:
        return self("POST", "/v1/chat/completions", json=CHAT | changes)


def app_of(inside: Bundle, script: Any = None, **options: Any) -> Any:
    return create_app(tiny.engine(script, bundle=inside, chat_template=tiny.CHATML), **options)


def problem(response: Any) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return f"{response.status_code} {error['message']}"


def alone(inside: Bundle, prompt: Any, **options: Any) -> Any:
    """What an engine of its own answers."""
    with tiny.engine(bundle=inside, chat_template=tiny.CHATML, context_length=2048) as engine:
        ids = prompt if isinstance(prompt, str) else engine.tokenizer.apply_chat_template(prompt)
        return engine.generate(ids, **options)
