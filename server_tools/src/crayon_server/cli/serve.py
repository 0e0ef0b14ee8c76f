"""crayon serve."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import click

from crayon_runtime.cli.common import PATH, note
from crayon_runtime.errors import InvalidInput, OutputError


@click.command()
@click.argument("pool", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--keys", type=PATH, help="The key store to sign adapters with; see `crayon keys`.")
@click.option("--api-key-file", type=PATH, help="A file with the key that clients have to send.")
@click.option("--cache", type=PATH, help="Where to keep finished adapters.  [default: until the service stops]")
def serve(pool: Path, host: str, port: int, keys: Path | None, api_key_file: Path | None, cache: Path | None) -> None:
    """Serve a pool: devices send alpha, and get an adapter.

    Put a proxy that speaks TLS in front of it before you listen on anything but this machine.
    """
    import uvicorn

    from crayon_server.service import create_app

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("crayon.service").setLevel(logging.INFO)
    with nullcontext(cache) if cache else tempfile.TemporaryDirectory(prefix="crayon-serve-") as folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"the cache cannot be written: {e.strerror}", where=folder) from e
        app = create_app(pool, keys, cache=Path(folder), api_key=_read_key(api_key_file))
        if keys is None:
            note("adapters are not signed: no --keys")
        with _listen(host, port) as listening:
            where = f"[{host}]" if ":" in host else host
            note(f"serving {pool} at http://{where}:{listening.getsockname()[1]}")
            config = uvicorn.Config(app, log_config=None, access_log=False, limit_concurrency=64, server_header=False)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
            uvicorn.Server(config).run([listening])


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput("the API key cannot be read", where=path, do="put one line of ASCII there") from e
    if not key.isprintable() or len(key) < 16:
        raise InvalidInput("the API key must be one line of at least 16 characters", where=path)
    return key


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        raise OutputError(
            f"this address cannot be listened on: {e.strerror}", where=f"{host}:{port}", do="choose another --port"
        ) from e
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; without it, answers wait for 40 ms
    return listening
