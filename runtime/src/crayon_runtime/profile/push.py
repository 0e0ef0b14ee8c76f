"""What a device needs of a bundle: files, each known by its hash, so that those that are there already are not sent again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from crayon_runtime.backends import served
from crayon_runtime.bundle import Bundle
from crayon_runtime.bundle.source import MANIFEST, SIGNATURE
from crayon_runtime.engine import adapter_bundle
from crayon_runtime.errors import BackendError, DeviceError
from crayon_runtime.files import sha256_file


class Item(NamedTuple):
    """A file for the device."""

    path: str
    """Where it will be, in the folder for the profile."""
    source: Path
    sha256: str
    size: int

    @classmethod
    def of(cls, path: str, source: Path) -> Item:
        return cls(path, source, sha256_file(source), source.stat().st_size)


def items_of(bundle: Bundle, folder: str) -> list[Item]:
    """All files of a bundle, with the hashes of its manifest: what was sent is compared with them."""
    listed = [
        Item(f"{folder}/{file.path}", bundle.path / file.path, file.sha256, file.size) for file in bundle.manifest.files
    ]
    own = (path for name in (MANIFEST, SIGNATURE) if (path := bundle.path / name).is_file())
    return listed + [Item.of(f"{folder}/{path.name}", path) for path in own]


def total(items: Iterable[Item]) -> int:
    """Bytes, of files with the same content once."""
    return sum({item.sha256: item.size for item in items}.values())


def check_served(bundle: Bundle, backend: str) -> None:
    """BackendError if the bundle was exported for other backends."""
    names = served(bundle)
    if backend != "auto" and backend not in names:
        raise BackendError(
            f"the bundle has nothing that {backend} runs: it was exported for {', '.join(names)}",
            where=bundle.path,
            do=f"use --backend {names[0]}, or export the model again with --backend {backend}",
        )


def adapter_outside(bundle: Bundle, adapter: str | None) -> Bundle | None:
    """The adapter bundle to send beside the model's; None for one inside it. AdapterError: there is no such adapter."""
    found = adapter_bundle(bundle, adapter) if adapter is not None else None
    return None if found is None or found.path.is_relative_to(bundle.path) else found


def check_sent(item: Item, sha256: str) -> None:
    """DeviceError if something else arrived than was meant to be sent."""
    if sha256 != item.sha256:
        raise DeviceError(
            "what arrived on the device is not the file that was to be sent",
            where=item.source,
            do="check the bundle with `crayon verify`, and the connection",
        )
