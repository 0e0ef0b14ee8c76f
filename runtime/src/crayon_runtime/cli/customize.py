"""crayon customize."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from crayon_runtime.cli.common import (
    PATH,
    backend_option,
    json_option,
    note,
    print_json,
    print_table,
    print_text,
    progress,
    size_text,
)
from crayon_runtime.errors import InvalidInput
from crayon_runtime.manifest import MOST_PROTOTYPES
from crayon_runtime.prototypes import SIZE

if TYPE_CHECKING:
    from crayon_runtime.customize import Customization
    from crayon_runtime.pool import Pool
    from crayon_runtime.remote import PoolClient
    from crayon_runtime.signing import TrustedKeys


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--examples", type=PATH, help="Lines of {prompt, completion}.  [default: those kept from the last time]")
@click.option("--pool", type=PATH, help="A pool on this device; nothing leaves it.")
@click.option("--server", metavar="URL", help="A service; alpha is sent to it, and nothing else of yours.")
@click.option("--keys", type=PATH, help="The keys.json of the service, kept for the next time.")
@click.option("--unsigned", is_flag=True, help="Accept what the service did not sign.")
@click.option("--api-key-file", type=PATH, help="A file with the key that the service asks for.")
@click.option("--plain-http", is_flag=True, help="Allow http to another machine: everybody on the way can read alpha.")
@click.option("--allow-older", is_flag=True, help="Accept an older pool than before from the service.")
@click.option("--dtype", type=click.Choice(["fp16", "fp32", "int8"]), help="Of the adapter to ask the service for.")
@click.option("--rank-limit", type=click.IntRange(min=1), help="The largest rank to ask the service for.")
@click.option(
    "--prototypes",
    type=click.IntRange(0, MOST_PROTOTYPES),
    default=SIZE,
    show_default=True,
    help="Of the pool's prototypes, how many come with the adapter, to tell when to ask the server LLM.",
)
@click.option("--refine", is_flag=True, help="Search alpha on the examples, without gradients; with --pool.")
@click.option("--refine-evaluations", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of that search.")
@click.option("--round", "digits", metavar="DIGITS", type=int, help="Round alpha.  [default with --server: 4]")
@click.option("--noise", metavar="SIGMA", type=float, default=0.0, help="Add noise to alpha, so that it tells less.")
@click.option("--again", is_flag=True, help="Also if nothing changed since the last time.")
@backend_option
@click.option("--threads", type=click.IntRange(min=1), help="Cores to compute on.  [default: all physical ones]")
@json_option
def customize(
    bundle: Path,
    examples: Path | None,
    pool: Path | None,
    server: str | None,
    keys: Path | None,
    unsigned: bool,
    api_key_file: Path | None,
    plain_http: bool,
    allow_older: bool,
    again: bool,
    backend: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Customize a model from about ten examples.

    The adapter is kept in BUNDLE.customized. It takes the place of an earlier one only if it changes what the model says and the
    examples' log-loss did not get worse; otherwise everything stays as it was, and the exit status is 1. Where neither the base
    model nor the examples, the pool or an option changed since the last time, nothing is done.
    """
    from crayon_runtime import customized
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.customize import customize as run
    from crayon_runtime.engine import Engine
    from crayon_runtime.examples import read_examples
    from crayon_runtime.files import recover

    if (pool is None) == (server is None):
        raise click.UsageError("give either --pool or --server")
    folder = customized.state_folder(bundle)
    recover(folder)
    texts = read_examples(examples) if examples else customized.kept_examples(folder)
    settings = customized.Settings(**options)
    with ExitStack() as stack:
        opened: Pool | PoolClient
        if server is not None:
            opened = stack.enter_context(
                client(server, folder, keys, unsigned=unsigned, api_key_file=api_key_file, plain_http=plain_http)
            )
            customized.check_serial(opened.manifest, folder, allow_older=allow_older)
        else:
            opened = _local(pool, keys, unsigned, api_key_file)
        started = time.perf_counter()
        model = Bundle.open(bundle)
        backend = customized.backend_for(model, backend, folder)
        if backend == "executorch":
            settings = msgspec.structs.replace(settings, backend=backend)
        made_from = customized.made_from(model.model.base_fingerprint, texts, opened.manifest, settings.checked(opened))
        if not again and _nothing_changed(bundle, folder, made_from, opened, as_json):
            return
        engine = stack.enter_context(Engine.load(model, backend=backend, threads=threads))
        load_seconds = time.perf_counter() - started
        on_evaluation = stack.enter_context(
            progress("refining", settings.refine_evaluations if settings.refine else None, unit="evaluations")
        )
        result = run(
            engine,
            texts,
            opened,
            folder=folder,
            allow_older=allow_older,
            on_evaluation=on_evaluation,
            **options,
        )
    if as_json:
        print_json(vars(result) | {"up_to_date": False, "seconds": {"load": load_seconds, **result.seconds}})
    else:
        if server is not None and (settings.noise or settings.digits is not None):
            note("what noise and rounding cost is not measured: the service would have to be told the exact alpha")
        _show(bundle, result, sent=server is not None)
    if not result.installed:
        if server is not None:
            customized.remember_refusal(folder, made_from, result.reason)
        click.get_current_context().exit(1)


def _local(pool: Path | None, *for_a_service: object) -> Pool:
    from crayon_runtime.pool import Pool

    if any(for_a_service):
        raise click.UsageError("--keys, --unsigned and --api-key-file are for --server")
    assert pool is not None
    return Pool.open(pool, verify=True)


def client(
    server: str, folder: Path, keys: Path | None, *, unsigned: bool, api_key_file: Path | None, plain_http: bool
) -> PoolClient:
    """A service that is trusted as was said.

    Raises:
        InvalidInput: nobody said whose signatures to trust, or the address or the key cannot be used.
    """
    from crayon_runtime.customized import cache_folder, pinned_keys
    from crayon_runtime.remote import PoolClient
    from crayon_runtime.signing import TrustedKeys

    if keys is not None and unsigned:
        raise click.UsageError("--keys and --unsigned exclude each other")
    trusted = None
    if not unsigned:
        trusted = TrustedKeys.read(keys) if keys is not None else pinned_keys(folder)
        if trusted is None:
            raise InvalidInput(
                "this device does not know the keys that the service signs with",
                where="--keys",
                do="give its keys.json, by a way that you trust, with --keys; or accept anything, with --unsigned",
            )
    return PoolClient(
        server,
        trusted=trusted,
        api_key=read_key(api_key_file),
        cache=cache_folder(folder),
        plain_http=plain_http,
        on_send=_announce,
    )


def read_key(path: Path | None) -> str | None:
    """The API key in a file; None without one. Raises InvalidInput if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput("the API key cannot be read", where=path, do="put one line of ASCII there") from e


def _announce(body: bytes) -> None:
    alpha = msgspec.json.decode(body)["alpha"]
    note(
        f"sending {len(alpha)} numbers, in {size_text(len(body))}: {body.decode()}\n"
        "alpha is a fingerprint: whoever sees it again can tell that it is the same user"
    )


def _nothing_changed(bundle: Path, folder: Path, made_from: str, pool: Pool | PoolClient, as_json: bool) -> bool:
    """Say so if customizing again would come to what it came to the last time."""
    from crayon_runtime import customized

    trusted: TrustedKeys | None = getattr(pool, "trusted", None)
    state = customized.current(folder, made_from, trusted)
    refusal = customized.refused_before(folder, made_from)
    if state is None and refusal is None:
        return False
    manifest = pool.manifest
    reason = f"already customized with pool {manifest.name} {manifest.version}; nothing changed since"
    if state is None:
        reason = f"nothing changed since the last time: {refusal}"
    adapter = folder / customized.ADAPTER if (folder / customized.STATE).exists() else None
    if as_json:
        print_json(
            {
                "installed": state is not None,
                "up_to_date": True,
                "reason": reason,
                "adapter": adapter,
                "sent_bytes": 0,
                "received_bytes": getattr(pool, "received_bytes", 0),
                "seconds": getattr(pool, "seconds", {}),
            }
        )
    elif state is None:
        print_text(f"not customized: {reason}; try it with --again")
    else:
        print_text(f"{reason}\ncrayon run {bundle} --adapter {adapter} PROMPT")
    if state is None:
        click.get_current_context().exit(1)
    return True


def _show(bundle: Path, result: Customization, *, sent: bool) -> None:
    if sent:
        note(f"sent {size_text(result.sent_bytes)}, received {size_text(result.received_bytes)}")
    else:
        size = len(msgspec.json.encode(result.sent))
        numbers = " ".join(f"{a:g}" for a in result.alpha)
        note(
            f"a service would be sent {len(result.alpha)} numbers, in {size_text(size)}: {numbers}\n"
            "alpha is a fingerprint: whoever sees it again can tell that it is the same user; with --pool nothing is sent"
        )
    rows = [("base model", result.log_loss_base), ("before", result.log_loss_before), ("new adapter", result.log_loss)]
    if result.log_loss_exact is not None:
        rows.append(("without noise and rounding", result.log_loss_exact))
    print_table(["log-loss of the examples", "nats per token"], [[name, f"{loss:.4f}"] for name, loss in rows])
    if result.prototypes_bytes:
        print_text(f"its prototypes, which tell when to ask the server LLM: {size_text(result.prototypes_bytes)}")
    if result.installed:
        print_text(f"customized: {result.reason}\ncrayon run {bundle} --adapter {result.adapter} PROMPT")
    else:
        kept = f"the earlier adapter stays: {result.adapter}" if result.adapter else "the base model stays as it is"
        print_text(f"not customized: {result.reason}; {kept}")
