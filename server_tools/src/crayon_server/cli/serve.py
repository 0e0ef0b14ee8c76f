"""crayon serve."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.cli.common import PATH, note, progress
from crayon_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import uvicorn
    from fastapi import FastAPI

_OPEN_REQUESTS = 64  # of a worker
_STOP_SECONDS = 10  # what open requests have to end
_START_SECONDS = 60  # what a worker has to say that it lives; on a busy machine even its start takes long
_STALL_SECONDS = 60  # how long a client may take nothing of what it is sent
_PATIENCE = 10.0  # seconds that may pass between tries to ask the server LLM, while a client waits


@click.command()
@click.argument("pool")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that answer.")
@click.option("--keys", type=PATH, help="The key store to sign adapters with; see `crayon keys`.")
@click.option("--api-key-file", type=PATH, help="A file with the key that clients have to send.")
@click.option("--rate-limit", metavar="RATE", help="How often one address may ask a worker, as 60/minute.")
@click.option("--proxy", metavar="ADDRESS", help="Of a proxy whose X-Forwarded-For names the client.")
@click.option("--cache", type=PATH, help="Where to keep finished adapters.  [default: until the service stops]")
@click.option(
    "--upstream",
    metavar="PLACE",
    help="The server LLM: the address of an OpenAI-compatible endpoint, a bundle, or a Hugging Face folder.",
)
@click.option("--upstream-model", metavar="NAME", help="Its name there.  [default: the first that is listed]")
@click.option("--upstream-key-file", type=PATH, help="A file with the key that it wants.")
@click.option(
    "--upstream-concurrency",
    type=click.IntRange(1, _OPEN_REQUESTS // 2),
    default=8,
    show_default=True,
    help="Queries that a worker passes to it at once.",
)
@click.option(
    "--upstream-timeout",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds until its answer has to begin.",
)
@click.option("--plain-http", is_flag=True, help="Let --upstream be http to another machine.")
def serve(
    pool: str,
    host: str,
    port: int,
    workers: int,
    keys: Path | None,
    api_key_file: Path | None,
    rate_limit: str | None,
    proxy: str | None,
    cache: Path | None,
    upstream: str | None,
    upstream_model: str | None,
    upstream_key_file: Path | None,
    upstream_concurrency: int,
    upstream_timeout: float,
    plain_http: bool,
) -> None:
    """Serve a pool: devices send alpha, and get an adapter.

    POOL is a folder, or where fsspec finds one, as s3://bucket/pool.

    With --upstream, OpenAI's clients find the server LLM at http://HOST:PORT/v1.

    Put a proxy that speaks TLS in front of it before you listen on anything but this machine.
    """
    from crayon_runtime.server.asgi import read_key
    from crayon_server.service.pools import fetch_pool, is_remote, without_credentials

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what is temporary is removed
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crayon-serve-")))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"the cache cannot be written: {e.strerror}", where=folder) from e
        application = partial(
            _application,
            fetch_pool(pool, _kept(cache) / "pools") if is_remote(pool) else Path(pool),
            keys,
            cache=folder,
            api_key=read_key(api_key_file) if api_key_file else None,
            rate_limit=rate_limit,
            upstream_concurrency=upstream_concurrency,
        )
        if upstream is not None:
            if not is_remote(upstream):
                application()  # what is wrong with it is said before a model is started
            application.keywords["upstream"] = {
                **_upstream(stack, upstream, _kept(cache), upstream_key_file, workers * upstream_concurrency),
                "model": upstream_model,
                "first_byte_timeout": upstream_timeout,
                "plain_http": plain_http,
            }
        listening = stack.enter_context(_listen(host, port))
        app = application()
        if keys is None:
            note("adapters are not signed: no --keys")
        where = f"[{host}]" if ":" in host else host
        note(f"serving {without_credentials(pool)} at http://{where}:{listening.getsockname()[1]}")
        if workers == 1:
            _run(app, listening, proxy)
        else:
            del app  # it was made to see that it can be
            _run_workers(application, listening, proxy, workers)


def _upstream(stack: ExitStack, place: str, cache: Path, key_file: Path | None, waiting: int) -> dict[str, object]:
    """Address and key of a server LLM; a model of this machine is served until the stack ends."""
    from crayon_runtime.cli.customize import read_key
    from crayon_server.service.pools import is_remote
    from crayon_server.upstream import as_bundle, serving

    if is_remote(place):
        return {"url": place, "api_key": read_key(key_file)}
    if key_file is not None:
        raise click.UsageError("--upstream-key-file is for the address of an endpoint")
    with progress("exporting the server LLM", None) as advance:
        bundle = as_bundle(Path(place), cache / "upstream", on_bytes=advance)
    local = stack.enter_context(serving(bundle, waiting=waiting))
    return {"url": local.url, "api_key": local.api_key}


def _application(*args: Path | None, upstream: dict[str, Any] | None = None, **options: Any) -> FastAPI:
    """`create_app`, also in a process of its own, which ends with the one that started it.

    Args:
        upstream: what makes an `Endpoint`.
    """
    from crayon_server.service import create_app
    from crayon_server.upstream import Endpoint

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("crayon.service").setLevel(logging.INFO)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, daemon=True).start()
    endpoint = Endpoint(**upstream, patience=_PATIENCE) if upstream else None
    return create_app(*args, upstream=endpoint, **options)  # type: ignore[arg-type]


def _run(app: FastAPI, listening: socket.socket, proxy: str | None) -> None:
    import uvicorn

    uvicorn.Server(_config(app, proxy)).run([listening])  # raises a signal that ends it once more, at its end


def _run_workers(application: Callable[[], FastAPI], listening: socket.socket, proxy: str | None, workers: int) -> None:
    from uvicorn.supervisors import Multiprocess

    from crayon_server.service.metrics import MULTIPROCESS

    with tempfile.TemporaryDirectory(prefix="crayon-metrics-") as folder:
        os.environ[MULTIPROCESS] = folder
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the cores are for the workers
        Multiprocess(_config(application, proxy, workers=workers, factory=True), [listening]).run()


def _config(app: Callable[..., object], proxy: str | None, **options: object) -> uvicorn.Config:
    import uvicorn

    from crayon_server.service.connection import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_OPEN_REQUESTS,
        timeout_graceful_shutdown=_STOP_SECONDS,
        timeout_worker_healthcheck=_START_SECONDS,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy or "",
        **options,  # type: ignore[arg-type]
    )


def _kept(cache: Path | None) -> Path:
    """Where is kept what is worth more than one run: pools from elsewhere, and exports."""
    from platformdirs import user_cache_path

    return cache or user_cache_path("crayon", appauthor=False)


def _listen(host: str, port: int) -> socket.socket:
    from crayon_runtime.server.asgi import listen

    listening = listen(host, port)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _STALL_SECONDS
        )  # connections inherit it
    return listening
