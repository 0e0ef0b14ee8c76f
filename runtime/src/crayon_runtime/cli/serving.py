"""crayon run --serve: its options, and what it serves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from crayon_runtime.cli.common import PATH, Command, note, with_options
from crayon_runtime.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from crayon_runtime.cli.hybrid import Hybrid
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import GenerateOptions
    from crayon_runtime.pool import Pool
    from crayon_runtime.remote import PoolClient
    from crayon_runtime.routing import Router


def serve_options(command: Command) -> Command:
    """Whom to serve, and with what."""
    options = [
        click.option(
            "--serve",
            "address",
            metavar="HOST:PORT",
            help="Answer programs and people at this address instead of PROMPT.",
        ),
        click.option("--api-key-file", type=PATH, help="With --serve: a file with the key that clients have to send."),
        click.option(
            "--waiting",
            type=click.IntRange(min=0),
            default=16,
            show_default=True,
            help="With --serve: requests that may wait.",
        ),
        click.option(
            "--conversations",
            type=click.IntRange(min=1),
            default=2,
            show_default=True,
            help="With --serve: KV caches to keep, each for a whole context.",
        ),
        click.option(
            "--pool", type=PATH, help="With --serve: customize with a pool on this device.  [default: with --server]"
        ),
        click.option("--keys", type=PATH, help="With --serve: the keys.json of the service that --server is."),
        click.option("--unsigned", is_flag=True, help="With --serve: accept what that service did not sign."),
    ]
    return with_options(command, options)


@dataclass(frozen=True)
class Serving:
    """What was said of serving. The fields are the parameters of `serve_options`."""

    address: str | None
    api_key_file: Path | None
    waiting: int
    conversations: int
    pool: Path | None
    keys: Path | None
    unsigned: bool

    @classmethod
    def take(cls, options: dict[str, Any]) -> Serving | None:
        """Take these options out of all; None if nothing is served.

        Raises:
            click.UsageError: some make no sense together.
        """
        said = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        if said.address is None:
            for name in ("pool", "keys", "unsigned"):
                if getattr(said, name):
                    raise click.UsageError(f"--{name} is for --serve")
            return None
        if said.keys is not None and said.unsigned:
            raise click.UsageError("--keys and --unsigned exclude each other")
        return said

    def backend(self, backend: str, bundle: Path, hybrid: Hybrid | None) -> str:
        """What to load for this: "auto" is what a customized adapter runs in, where there is one, or may come to be."""
        from crayon_runtime.bundle import Bundle
        from crayon_runtime.customized import ADAPTER, backend_for, state_folder

        folder = state_folder(bundle)
        customizes = self._pool(folder, hybrid) is not None or (folder / ADAPTER).is_dir()
        return backend_for(Bundle.open(bundle), backend, folder) if customizes else backend

    def run(
        self,
        engine: Engine,
        bundle: Path,
        adapter: str | None,
        defaults: dict[str, Any],
        hybrid: Hybrid | None,
        router: Router | None,
    ) -> None:
        """Serve until interrupted."""
        from crayon_runtime.customized import state_folder

        try:
            from crayon_runtime.server import create_app
            from crayon_runtime.server.asgi import is_loopback, listen, parse_address, read_key
            from crayon_runtime.server.customizing import Customizer
            from crayon_runtime.server.serve import serve
        except ModuleNotFoundError as e:
            if (e.name or "").startswith("crayon_"):
                raise
            raise MissingExtra("serve", "crayon run --serve") from e
        assert self.address is not None
        api_key = read_key(self.api_key_file) if self.api_key_file else None
        host, port = parse_address(self.address)
        folder = state_folder(bundle)
        service = None if hybrid is None or self.pool is not None else hybrid.server
        with listen(host, port) as listening:
            loopback = is_loopback(listening)
            if not loopback and api_key is None:
                raise InvalidInput(
                    "others than this machine reach this address, so a key is needed",
                    where=f"--serve {self.address}",
                    do="add --api-key-file FILE, or serve 127.0.0.1",
                )
            app = create_app(
                engine,
                customized=folder,
                adapter=adapter,
                defaults=cast("GenerateOptions", defaults),
                router=router,
                customizer=Customizer(engine, folder, self._pool(folder, hybrid), to=service),
                waiting=self.waiting,
                conversations=self.conversations,
                api_key=api_key,
                loopback=loopback,
            )
            where = f"[{host}]" if ":" in host else host
            url = f"http://{where}:{listening.getsockname()[1]}"
            note(f"serving {bundle} at {url}/v1")
            note(f"a page to talk to it: {url}")
            serve(app, listening)

    def _pool(
        self, folder: Path, hybrid: Hybrid | None
    ) -> Callable[[], AbstractContextManager[Pool | PoolClient]] | None:
        """What opens the pool to customize with, when somebody wants to; None: there is none."""
        from crayon_runtime.cli.customize import client

        path = self.pool
        if path is not None:

            def local() -> AbstractContextManager[Pool]:
                from crayon_runtime.pool import Pool

                return nullcontext(Pool.open(path, verify=True))

            local()  # says what is wrong with it now
            return local
        if hybrid is None or hybrid.server is None or hybrid.offline:
            return None
        url, key, plain_http = hybrid.server, hybrid.server_key_file, hybrid.plain_http
        return lambda: client(url, folder, self.keys, unsigned=self.unsigned, api_key_file=key, plain_http=plain_http)
