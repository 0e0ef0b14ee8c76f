"""crayon keys: the keys that sign bundles."""

from __future__ import annotations

from pathlib import Path

import click

from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.common import PATH, json_option, note, print_json, print_table, print_text
from crayon_runtime.signing import KEYS, Key, KeyStore
from crayon_runtime.signing import sign as sign_bundle


@click.group()
def keys() -> None:
    """Create, list, rotate and revoke the keys that sign bundles.

    STORE is a folder. Its keys.json is public: devices that shall trust the server get a copy. Its .seed files are secret.
    """


@keys.command()
@click.argument("store", type=PATH)
@json_option
def create(store: Path, as_json: bool) -> None:
    """Make a key store with its first key."""
    made = KeyStore.create(store)
    _print(made.keys[-1], as_json)
    note(f"give devices a copy of {made.path / KEYS}, and keep the .seed files where they are")


@keys.command("list")
@click.argument("store", type=PATH)
@json_option
def list_keys(store: Path, as_json: bool) -> None:
    """Show every key, and which one signs."""
    opened = KeyStore.open(store)
    current = opened.current
    if as_json:
        print_json({"keys": opened.keys, "current": current.id if current else None})
        return
    print_table(
        ["key", "created", "state"],
        [
            [
                key.id,
                f"{key.created:%Y-%m-%d %H:%M}",
                f"revoked {key.revoked:%Y-%m-%d %H:%M}" if key.revoked else "signs" if key is current else "valid",
            ]
            for key in opened.keys
        ],
    )


@keys.command()
@click.argument("store", type=PATH)
@json_option
def rotate(store: Path, as_json: bool) -> None:
    """Make a new key, which signs from now on.

    What older keys signed stays valid until they are revoked. Devices need the new keys.json before they accept the new key.
    """
    _print(KeyStore.open(store).rotate(), as_json)


@keys.command()
@click.argument("store", type=PATH)
@click.argument("key")
@json_option
def revoke(store: Path, key: str, as_json: bool) -> None:
    """Declare a key invalid, and all that it signed.

    Its seed is removed. Devices refuse its signatures from when they get the new keys.json.
    """
    _print(KeyStore.open(store).revoke(key), as_json)


@keys.command()
@click.argument("store", type=PATH)
@click.argument("bundle", type=PATH)
@json_option
def sign(store: Path, bundle: Path, as_json: bool) -> None:
    """Sign the folder of a bundle; pack it afterwards."""
    if not bundle.is_dir():
        raise click.UsageError("BUNDLE must be a folder: unpack the archive, sign the folder, and pack it again")
    key = KeyStore.open(store).signing_key()
    sign_bundle(Bundle.open(bundle), key)
    if as_json:
        print_json({"bundle": bundle, "key": key.id})
    else:
        print_text(f"{bundle}: signed by {key.id}")


def _print(key: Key, as_json: bool) -> None:
    if as_json:
        print_json({"key": key})
    else:
        print_text(key.id)
