"""A server LLM written by hand, which misbehaves as it is told: for everything that passes queries on to one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tests.runtime.services import Fault, Handler, Listening, answers

ANSWER = "the answer"


def completion(text: str | None = ANSWER) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "large", "choices": [choice]}


def chunk(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "large", "choices": [choice]}


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


STREAM = [event(chunk(text)) for text in ("the", " ", "answer")] + [event(chunk(None, "stop")), event(b"[DONE]")]


class ServerLLM(Listening):
    """Answers every request as it should but for the faults that are queued. Use it in a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = 0
        self.faults: list[Fault] = []
        """Each answers one request, the first first."""
        self.always: Fault | None = None
        """Answers what no queued fault does."""
        self.models: Fault = _list
        self.over = threading.Event()
        """The test is: nobody needs to wait any more."""
        self.now = self.most = 0
        """How many requests are being answered, and the most that were."""
        self._lock = threading.Lock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()
        super().__exit__(kind, error, at)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(asked.body) for asked in self.asked]

    def answer(self, to: Handler) -> None:
        request = self.read(to)
        if to.path == "/v1/models":
            self.listed += 1
            self.models(to)
            return
        self.asked.append(request)
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            fault = self.faults.pop(0) if self.faults else self.always
            (fault or behave)(to)
        finally:
            with self._lock:
                self.now -= 1


def _list(to: Handler) -> None:
    replies({"object": "list", "data": [{"id": "large", "object": "model"}, {"id": "other", "object": "model"}]})(to)


def behave(to: Handler) -> None:
    """As a server LLM should."""
    asked: ServerLLM = to.service  # type: ignore[assignment]
    streamed = json.loads(asked.asked[-1].body).get("stream")
    (streams(*STREAM) if streamed else replies(completion()))(to)


def replies(content: object, status: int = 200, **headers: Any) -> Fault:
    """JSON."""
    return answers(status, json.dumps(content).encode(), Content_Type="application/json", **headers)


def streams(*pieces: bytes | Callable[[], object], cut: bool = False) -> Fault:
    """Server-sent events: each piece as it is, or what is done between them. `cut`: without the end of the body."""

    def fault(to: Handler) -> None:
        to.head(200, Content_Type="text/event-stream; charset=utf-8", Transfer_Encoding="chunked")
        for piece in pieces:
            if callable(piece):
                piece()
            else:
                to.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                to.wfile.flush()
        if cut:
            to.cut()
        else:
            to.wfile.write(b"0\r\n\r\n")

    return fault


def stalls(to: Handler) -> None:
    """Nothing, for longer than anybody should wait."""
    to.service.over.wait(30)  # type: ignore[attr-defined]


def gone(to: Handler) -> bool:
    """Whether who asked has closed the connection; waits for it."""
    to.connection.settimeout(20)
    return to.connection.recv(1) == b""
