"""The pool that is served: fetched from where it lies, and held as it was when the service started."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from crayon_runtime.errors import IntegrityError, InvalidInput, OutputError
from crayon_runtime.files import CHUNK, sha256_file
from crayon_runtime.manifest import File
from crayon_runtime.pool import MANIFEST, PROJECTION, Pool, parse_manifest

_LARGEST_MANIFEST = 16 << 20


@dataclass(frozen=True)
class ServedPool:
    """A pool, with the two files that are sent as they are: even if another pool takes its place, all stay of one build."""

    pool: Pool
    document: bytes
    """pool.json."""
    projection: Path
    """projection.safetensors, also after it was removed from its folder."""
    projection_sha256: str

    @classmethod
    def open(cls, path: Path) -> ServedPool:
        """Open a pool, check every hash, and keep what is served.

        Raises:
            CrayonError: it cannot be used, or was replaced meanwhile.
        """
        pool = Pool.open(path, verify=True)
        try:
            document = (pool.path / MANIFEST).read_bytes()
            projection = os.open(pool.path / PROJECTION, os.O_RDONLY)
        except OSError as e:
            raise IntegrityError(f"the pool is gone: {e.strerror}", where=path) from None
        held = Path(f"/proc/self/fd/{projection}")  # the file, whatever its name is given to
        held = held if held.exists() else pool.path / PROJECTION  # a system without /proc
        wanted = next(file.sha256 for file in pool.manifest.files if file.path == PROJECTION)
        same = parse_manifest(document, where=str(path)) == pool.manifest and sha256_file(held) == wanted
        if not same:
            raise IntegrityError("the pool was replaced while it was opened", where=path, do="start again")
        served = cls(pool, document, held, wanted)
        weakref.finalize(served, os.close, projection)
        return served


def is_remote(place: str) -> bool:
    """Whether it is an address, and not a path."""
    return "://" in place


def fetch_pool(url: str, folder: Path) -> Path:
    """Fetch a pool from any place that fsspec reads into a folder of this machine.

    Every file is checked against its hash in pool.json. Those that are there and right are not fetched again, and a fetch that was cut
    off goes on where it stopped.

    Args:
        url: as s3://bucket/pool. Credentials are for fsspec to find; they are never printed.
        folder: of all fetched pools. A pool lies there under its name, version and the hash of its pool.json.

    Returns:
        The pool's folder.

    Raises:
        InvalidInput: the place cannot be read.
        IntegrityError: a file is not what pool.json says.
        OutputError: the folder cannot be written, or the disk is full.
    """
    place = without_credentials(url)
    with _reading(place):
        import fsspec

        files, root = fsspec.url_to_fs(url)
        root = root.rstrip("/")
        with files.open(f"{root}/{MANIFEST}", "rb") as stream:
            document: bytes = stream.read(_LARGEST_MANIFEST)
    manifest = parse_manifest(document, where=place)
    digest = hashlib.sha256(document).hexdigest()[:8]
    target = folder / f"{manifest.name}-{manifest.version}-{digest}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            for file in manifest.files:
                _fetch(files, f"{root}/{file.path}", file, target, place)
            (target / f".{MANIFEST}").write_bytes(document)
            (target / f".{MANIFEST}").replace(target / MANIFEST)  # last: without it there is no pool
    except OSError as e:
        raise OutputError(
            f"the pool cannot be kept here: {e.strerror}", where=folder, do="choose another --cache"
        ) from e
    return target


def without_credentials(url: str) -> str:
    """An address as it may be shown: without user, password and query."""
    return re.sub(r"://[^/@]*@", "://", url).partition("?")[0]


def _fetch(files: Any, source: str, file: File, target: Path, place: str) -> None:
    """One file of a pool, from where an earlier fetch stopped."""
    path = target / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # what was there may be wrong
        have = path.stat().st_size if path.exists() else 0
        if have < file.size:
            with path.open("ab") as out:
                _append(files, source, out, have, file.size, f"{place}/{file.path}")
        if path.stat().st_size == file.size and sha256_file(path) == file.sha256:
            return
        path.unlink()
        if not have:
            break
    raise IntegrityError(
        f"{file.path} is not what pool.json says",
        where=place,
        do="upload the pool again; it may be mixed from two builds",
    )


def _append(files: Any, source: str, out: BinaryIO, start: int, end: int, place: str) -> None:
    with _reading(place):
        stream = files.open(source, "rb")
        stream.seek(start)
    with stream:
        while start < end:
            with _reading(place):
                chunk = stream.read(min(CHUNK, end - start))
            if not chunk:
                return
            out.write(chunk)
            start += len(chunk)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn whatever a file system of fsspec raises, which are exceptions of many libraries, into InvalidInput."""
    try:
        yield
    except Exception as e:
        missing = isinstance(e, ImportError)
        raise InvalidInput(
            f"the pool cannot be read: {str(e) if missing else type(e).__name__}",
            where=place,
            do="install what fsspec asks for"
            if missing
            else "check the address, and the credentials in the environment",
        ) from e


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time fetches into a folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
