"""A customization service written by hand, which misbehaves as it is told: for everything that talks to one."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from crayon_runtime.blend import write_adapter_bundle
from crayon_runtime.bundle import pack
from crayon_runtime.pool import Pool
from crayon_runtime.signing import KeyStore, sign, sign_document
from tests.support import needs

POOL, SIGNATURE, PROJECTION = "/v1/pool", "/v1/pool/signature", "/v1/pool/projection"
POST, AGAIN = "/v1/customizations", "/v1/customizations/name"


class Asked(NamedTuple):
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Listening

    def do_GET(self) -> None:
        self.service.answer(self)

    def do_POST(self) -> None:
        self.service.answer(self)

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        """Status and headers; Content_Length is written Content-Length."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def reply(self, status: int, content: bytes = b"", **headers: object) -> None:
        self.head(status, Content_Length=len(content), **headers)
        self.wfile.write(content)

    def cut(self) -> None:
        """Close the connection here."""
        self.wfile.flush()
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what many tests are about."""


Fault = Callable[[Handler], object]


class Listening:
    """A server on a free port of this machine, for as long as a `with` block."""

    def __init__(self, handler: type[Handler] = Handler) -> None:
        self.asked: list[Asked] = []
        self._server = _Server(("127.0.0.1", 0), type("BoundHandler", (handler,), {"service": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, to: Handler) -> None:
        raise NotImplementedError

    @staticmethod
    def read(to: Handler) -> Asked:
        """The request, with its body."""
        headers = {name.lower(): value for name, value in to.headers.items()}
        return Asked(to.command, to.path, headers, to.rfile.read(int(headers.get("content-length", 0))))


class Service(Listening):
    """Serves a pool, each path as it should but for the faults that are queued for it. Use it in a `with` block."""

    def __init__(self, pool: Pool, keys: KeyStore | None, folder: Path) -> None:
        super().__init__()
        self.keys, self._folder = keys, folder
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        """By path: each answers one request, the first first."""
        self.always: dict[str, Fault] = {}
        """By path: answers what no queued fault does."""
        self.ranges = True
        self.edit: Callable[[Path], object] = lambda _: None
        """Changes the folder of an adapter bundle before it is signed and packed."""
        self.archives: dict[str, bytes] = {}
        self.serve(pool)

    def serve(self, pool: Pool) -> None:
        """Serve this pool from now on."""
        self.pool = pool
        self.document = (pool.path / "pool.json").read_bytes()
        self.projection = (pool.path / "projection.safetensors").read_bytes()

    @property
    def signature(self) -> bytes | None:
        return sign_document(self.document, self.keys.signing_key()) if self.keys else None

    def count(self, path: str) -> int:
        return sum(asked.path == path for asked in self.asked)

    def archive(self, body: bytes) -> bytes:
        """What this service would answer."""
        asked = json.loads(body)
        alpha, size = asked["alpha"], asked.get("prototypes", 64)
        key = f"{self.pool.manifest.version} {alpha} {size}"
        if key not in self.archives:
            number = len(self.archives)
            out = self._folder / f"made-{number}"
            bundle = write_adapter_bundle(
                self.pool.blend(alpha),
                out,
                name=f"adapter-{number}",
                base_fingerprint=self.pool.manifest.base_fingerprint,
                pool=self.pool.manifest.origin,
                prototypes=self.pool.prototypes.picked(alpha, size) if self.pool.prototypes else None,
            )
            self.edit(out)
            if self.keys:
                sign(type(bundle).open(out), self.keys.signing_key())
            self.archives[key] = pack(out, self._folder / f"{number}.crayon").read_bytes()
        self.last = self.archives[key]
        return self.last

    def answer(self, to: Handler) -> None:
        request = self.read(to)
        self.asked.append(request)
        if to.path == POST:
            self.archive(request.body)
        if self.faults[to.path]:
            self.faults[to.path].pop(0)(to)
        elif to.path in self.always:
            self.always[to.path](to)
        else:
            self.behave(to)

    def behave(self, to: Handler) -> None:
        """As a service should."""
        match to.path:
            case "/v1/pool":
                tag = f'"{abs(hash(self.document))}"'
                known = to.headers.get("if-none-match") == tag
                to.reply(304, ETag=tag) if known else to.reply(200, self.document, ETag=tag)
            case "/v1/pool/signature":
                to.reply(200, self.signature) if self.signature else to.reply(404)
            case "/v1/pool/projection":
                to.reply(200, self.projection, ETag='"projection"')
            case "/v1/customizations":
                to.reply(200, self.last, ETag=self.tag, Content_Location=AGAIN)
            case "/v1/customizations/name":
                self._part(to)
            case _:
                to.reply(404)

    @property
    def tag(self) -> str:
        return f'"{abs(hash(self.last))}"'

    def _part(self, to: Handler) -> None:
        wanted = to.headers.get("range")
        if wanted and self.ranges and to.headers.get("if-range") == self.tag:
            start, size = int(wanted.removeprefix("bytes=").removesuffix("-")), len(self.last)
            to.reply(206, self.last[start:], ETag=self.tag, Content_Range=f"bytes {start}-{size - 1}/{size}")
        else:
            to.reply(200, self.last, ETag=self.tag)


@contextmanager
def real(pool: Pool, keys: KeyStore | None, folder: Path, **options: Any) -> Iterator[str]:
    """The real service, in a thread; yields its address."""
    uvicorn = needs.module("uvicorn")
    needs.module("fastapi")
    from crayon_server.service import create_app

    folder.mkdir()
    app = create_app(pool.path, keys.path if keys else None, cache=folder, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def cut_at(at: int, **headers: Any) -> Fault:
    """The archive as it should be, up to a byte."""

    def fault(to: Handler) -> None:
        service = to.service
        to.head(200, **{"Content_Length": len(service.last), "ETag": service.tag, "Content_Location": AGAIN} | headers)
        to.wfile.write(service.last[:at])
        to.cut()

    return fault


def answers(status: int, content: bytes = b"", **headers: Any) -> Fault:
    return lambda to: to.reply(status, content, **headers)


def refuses(status: int, what: str = "no", do: str | None = None, **headers: Any) -> Fault:
    """As this project's services say it."""
    return answers(status, json.dumps({"error": {"what": what, "where": None, "do": do}}).encode(), **headers)


def hangs_up(to: Handler) -> None:
    """Nothing at all."""
    to.cut()
