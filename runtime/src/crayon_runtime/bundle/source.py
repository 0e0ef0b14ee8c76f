"""Where the files of a bundle come from: a folder, or (in `archive`) one file. Reading through a source is always checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from crayon_runtime.errors import BundleError, IntegrityError, ManifestError, SignatureError
from crayon_runtime.files import CHUNK
from crayon_runtime.manifest import File, Manifest, ModelManifest

MANIFEST = "manifest.json"
STAMP = ".installed.json"
SIGNATURE = "signature.json"
"""The one file besides the stamp that a manifest cannot list, because it signs the manifest."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

_LARGEST_MANIFEST = 16 << 20
_LARGEST_SIGNATURE = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """What a source holds under a path."""

    size: int
    fault: str | None = None
    """Why it cannot be a file of a bundle: "is a symbolic link"."""


class Source(Protocol):
    path: Path
    entries: dict[str, Entry]
    """Everything that is not a plain folder, by its path relative to the bundle."""
    read_errors: tuple[type[Exception], ...]
    """What `open` and reading may raise where the disk or the archive is damaged."""

    def open(self, path: str) -> IO[bytes]: ...


class Folder:
    """A bundle as a folder. Symbolic links are never followed."""

    read_errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.lexists(path / MANIFEST):
            raise _no_manifest(path)
        try:
            self.entries = dict(_walk(path, ""))
        except OSError as e:
            raise BundleError(f"the bundle cannot be read: {e.strerror}", where=e.filename or path) from e

    def open(self, path: str) -> IO[bytes]:
        return os.fdopen(os.open(self.path / path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    with os.scandir(folder) as found:
        for item in found:
            path, status = prefix + item.name, item.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(folder / item.name, path + "/")
            elif stat.S_ISREG(status.st_mode):
                yield path, Entry(status.st_size)
            else:
                link = stat.S_ISLNK(status.st_mode)
                yield path, Entry(0, "is a symbolic link" if link else "is not a regular file")


def read_manifest(source: Source, path: str = MANIFEST) -> bytes:
    """The bytes of a bundle's manifest.json, or of that of an adapter inside it."""
    entry = source.entries.get(path)
    if entry is None:
        raise _no_manifest(source.path)
    if entry.fault or entry.size > _LARGEST_MANIFEST:
        raise ManifestError(f"{path} {entry.fault or f'has {entry.size} bytes'}", where=source.path)
    with _read_errors(source, path), source.open(path) as file:
        return b"".join(iter(lambda: file.read(CHUNK), b""))


def read_signature(source: Source) -> bytes | None:
    """The bytes of a bundle's signature.json, which nothing here vouches for; None if it is not signed.

    Raises:
        SignatureError: it is not a small plain file.
    """
    entry = source.entries.get(SIGNATURE)
    if entry is None:
        return None
    if entry.fault or entry.size > _LARGEST_SIGNATURE:
        raise SignatureError(f"{SIGNATURE} {entry.fault or f'has {entry.size} bytes'}", where=source.path)
    return read_head(source, SIGNATURE, _LARGEST_SIGNATURE)


def read_head(source: Source, path: str, size: int) -> bytes:
    """The first bytes of a file; fewer if it ends before."""
    with _read_errors(source, path), source.open(path) as file:
        return file.read(size)


def _no_manifest(path: Path) -> ManifestError:
    return ManifestError(
        "there is no manifest.json; this is not a bundle",
        where=path,
        do="make a bundle of a model with `crayon export`",
    )


def check_entries(source: Source, manifest: Manifest, *, nothing_else: bool) -> None:
    """Refuse a source in which a file of the manifest is missing, irregular or of another size.

    Args:
        nothing_else: also refuse files that the manifest does not list.
    """
    listed = {file.path: file.size for file in manifest.files}
    for path, size in listed.items():
        entry = source.entries.get(path) or _parent(source, path)
        if entry is None:
            problem = "is missing"
        elif entry.fault:
            problem = entry.fault
        elif entry.size != size:
            problem = f"has {entry.size} bytes; the manifest says {size}"
        else:
            continue
        raise IntegrityError(f"{path} {problem}", where=source.path, do=_advice(problem))
    if nothing_else:
        read_signature(source)
        stamps = [f"{folder}/{STAMP}" for folder in manifest.adapters] if isinstance(manifest, ModelManifest) else []
        foreign = sorted(source.entries.keys() - listed.keys() - {MANIFEST, STAMP, SIGNATURE, *stamps})
        if foreign:
            fault = source.entries[foreign[0]].fault
            raise IntegrityError(
                f"{foreign[0]} is not listed in the manifest" + (f", and {fault}" if fault else ""),
                where=source.path,
                do="remove it if you know what it is; otherwise do not use this bundle",
            )


def _parent(source: Source, path: str) -> Entry | None:
    """Something that is not a plain folder, where a folder should be that holds `path`."""
    for folder in PurePosixPath(path).parents:
        if entry := source.entries.get(str(folder)):
            return Entry(0, f"cannot be read: {folder} {entry.fault or 'is a file'}")
    return None


def _advice(problem: str) -> str:
    if "symbolic link" in problem:
        return "copy the bundle with its links followed (cp -rL)"
    return "fetch, copy or export the bundle again"


def read_file(source: Source, file: File) -> Iterator[bytes]:
    """The contents of one file in pieces, never more than the manifest declares.

    Raises:
        IntegrityError: it cannot be read, or (at the end) its size or SHA-256 is not what the manifest says.
    """
    digest, left = hashlib.sha256(), file.size
    with _read_errors(source, file.path), source.open(file.path) as stream:
        while chunk := stream.read(min(CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        longer = bool(stream.read(1))
    if left or longer or digest.hexdigest() != file.sha256:
        raise IntegrityError(
            f"{file.path} is damaged: its SHA-256 is not what the manifest says",
            where=source.path,
            do=_advice("damaged"),
        )


def check_files(source: Source, manifest: Manifest, on_bytes: OnBytes | None = None) -> None:
    """Read everything once, and refuse whatever is not exactly what the manifest says."""
    check_entries(source, manifest, nothing_else=True)
    for file in manifest.files:
        for chunk in read_file(source, file):
            if on_bytes:
                on_bytes(len(chunk))


@contextmanager
def _read_errors(source: Source, path: str) -> Iterator[None]:
    try:
        yield
    except source.read_errors as e:
        problem = str(e) or "it ends too early"
        raise IntegrityError(f"{path} cannot be read: {problem}", where=source.path, do=_advice(problem)) from e
