"""What goes over the network, byte by byte: a relay on loopback that passes everything on unchanged, and writes it down."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

_CHUNK = 1 << 16
_LOOK_UP = 0.05  # seconds after which the relay looks whether it shall end
_END = b"\r\n\r\n"


@dataclass
class Exchange:
    """A request and its response, as they stood on the wire.

    Attributes:
        started, answered, ended: seconds of `time.perf_counter`, of the first byte up, the first byte down and the last.
    """

    request: bytes = b""
    response: bytes = b""
    started: float = field(default_factory=time.perf_counter)
    answered: float = 0.0
    ended: float = 0.0

    def add(self, data: bytes, *, up: bool) -> None:
        now = time.perf_counter()
        if up:
            self.request += data
        else:
            self.answered = self.answered or now
            self.response += data
        self.ended = now


class Wire:
    """A relay to one service, for HTTP/1.1 without pipelining: whoever speaks after the other has answered begins a new exchange.

    Args:
        host, port: of the service.
    """

    def __init__(self, host: str, port: int) -> None:
        self._service = host, port
        self._talks: list[list[Exchange]] = []
        self._ended = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(_LOOK_UP)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to reach the service through this relay."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    @property
    def exchanges(self) -> list[Exchange]:
        """All that has passed, in the order in which it began."""
        return sorted((exchange for talk in self._talks for exchange in talk), key=lambda e: e.started)

    @property
    def bytes_up(self) -> int:
        """That the client has sent so far."""
        return sum(len(exchange.request) for talk in list(self._talks) for exchange in list(talk))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._listening.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client = self._listening.accept()[0]
            except TimeoutError:
                continue
            talk: list[Exchange] = []
            self._talks.append(talk)
            threading.Thread(target=self._relay, args=(client, talk), daemon=True).start()

    def _relay(self, client: socket.socket, talk: list[Exchange]) -> None:
        """One connection, until either side ends it."""
        # Not `select`: it takes no descriptor above 1023, and a process with many open files has only those left.
        with (
            client,
            suppress(OSError),
            socket.create_connection(self._service) as service,
            selectors.DefaultSelector() as ready,
        ):
            for end, other in ((client, service), (service, client)):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(end, selectors.EVENT_READ, (end, other))
            while not self._ended.is_set():
                for key, _ in ready.select(_LOOK_UP):
                    end, other = key.data
                    data = end.recv(_CHUNK)
                    if not data:
                        return
                    if end is client and (not talk or talk[-1].response):
                        talk.append(Exchange())
                    talk[-1].add(data, up=end is client)
                    other.sendall(data)


def split(message: bytes) -> tuple[bytes, bytes]:
    """The head of an HTTP message, with the empty line that ends it, and its body."""
    head, end, body = message.partition(_END)
    return head + end, body
