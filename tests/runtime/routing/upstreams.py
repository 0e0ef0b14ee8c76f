"""A server LLM written by hand, which answers and misbehaves as it is told: for everything that asks one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from tests.runtime.services import Fault, Handler, Listening

COMPLETIONS = "/v1/chat/completions"


class Upstream(Listening):
    """Answers each request with the next of its scripts, and all others with `always`. Use it in a `with` block."""

    def __init__(self, *scripts: Fault) -> None:
        self.scripts = list(scripts)
        self.always: Fault = streams("an", " answer")
        self.connections = 0
        """Opened so far."""
        upstream = self

        class Counted(Handler):
            def setup(self) -> None:
                upstream.connections += 1
                super().setup()

        super().__init__(Counted)

    @property
    def queries(self) -> list[str]:
        """What it was asked."""
        return [json.loads(asked.body)["messages"][-1]["content"] for asked in self.asked]

    def answer(self, to: Handler) -> None:
        self.asked.append(self.read(to))
        (self.scripts.pop(0) if self.scripts else self.always)(to)


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One server-sent event of an answer."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse({"id": "x", "object": "chat.completion.chunk", "choices": [choice], **more})


def sse(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def streams(*pieces: str, finish: str | None = "stop", pause: float = 0.0) -> Fault:
    """As a server should, with seconds between the pieces."""
    return sends(chunk("", role="assistant"), *map(chunk, pieces), chunk(finish=finish), DONE, pause=pause)


def sends(*parts: bytes, pause: float = 0.0, end: bool = True, content_type: str = "text/event-stream") -> Fault:
    """Bytes as they are, in chunks of HTTP.

    Args:
        end: whether the answer is ended as HTTP asks for, or the connection cut.
    """

    def fault(to: Handler) -> None:
        to.head(200, Content_Type=content_type, Transfer_Encoding="chunked")
        _write(to, parts, pause)
        if end:
            to.wfile.write(b"0\r\n\r\n")
        else:
            to.cut()

    return fault


def _write(to: Handler, parts: Iterable[bytes], pause: float) -> None:
    for part in parts:
        to.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        to.wfile.flush()
        if pause:
            time.sleep(pause)


def completes(text: str | None, finish: str | None = "stop", **more: Any) -> Fault:
    """Whole, as a server does that cannot stream."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    content = json.dumps({"object": "chat.completion", "choices": [choice], **more}).encode()
    return lambda to: to.reply(200, content, Content_Type="application/json; charset=utf-8")


def refuses(status: int, message: str = "no", **headers: Any) -> Fault:
    """As OpenAI says it."""
    content = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()
    return lambda to: to.reply(status, content, Content_Type="application/json", **headers)


def silent(free: threading.Event) -> Fault:
    """Nothing at all, until it is set free."""

    def fault(to: Handler) -> None:
        free.wait(30)
        to.cut()

    return fault
