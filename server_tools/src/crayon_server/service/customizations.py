"""Adapter bundles made to order: blended, signed, packed, and kept in a folder for who asks for the same again."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from crayon_runtime.affinity import check_alpha
from crayon_runtime.blend import write_adapter_bundle
from crayon_runtime.bundle import pack
from crayon_runtime.manifest import PRODUCER, Sha256
from crayon_runtime.pool import MANIFEST, Pool
from crayon_runtime.signing import sign

if TYPE_CHECKING:
    from crayon_runtime.signing import SigningKey

DECIMALS = 4
"""Of alpha. Noise of 0.02 costs at most two points of exact match on the generated benchmark, so this costs nothing."""

_IN_USE = 60.0  # seconds for which what was asked for is not removed


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request: all that a device tells about its user."""

    base_fingerprint: Sha256
    pool_version: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    alpha: Annotated[list[float], Meta(max_length=4096, description="the weight of each adapter of the pool")]


class Customizations:
    """The archives of one pool. Threads and processes may share a folder.

    Args:
        key: signs the bundles; None: they are not signed.
        cache: the folder of the archives.
        cache_bytes: above this, archives that nobody asked for in the last minute are removed, the oldest first.
    """

    def __init__(self, pool: Pool, key: SigningKey | None, cache: Path, cache_bytes: int) -> None:
        self._pool = pool
        self._document = (pool.path / MANIFEST).read_bytes()
        self._key = key
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._building = threading.Lock()  # a blend keeps the memory bus busy; two at once are no faster

    def make(self, alpha: list[float]) -> Path:
        """The archive of an adapter, blended by alpha rounded to `DECIMALS`. The same alpha gives the same bytes.

        Raises:
            InvalidInput: alpha cannot be blended.
            CrayonError: the pool is damaged, or the disk is full.
        """
        manifest = self._pool.manifest
        checked = check_alpha(alpha, manifest.adapters, signed=manifest.weighting.signed)
        rounded = np.asarray(checked, np.float64).round(DECIMALS) + 0.0  # -0 becomes 0
        name = self._identify(rounded)
        path = self._cache / f"{name}.crayon"
        if self.find(name) is None:
            with self._building:
                if self.find(name) is None:  # nobody made it meanwhile
                    self._build(rounded, name, path)
                    self._clean(path)
        return path

    def find(self, name: str) -> Path | None:
        """An archive that was made before and is still here, by the stem of its path."""
        if not re.fullmatch("[0-9a-f]{32}", name):
            return None
        path = self._cache / f"{name}.crayon"
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def _identify(self, alpha: npt.NDArray[np.float64]) -> str:
        """Not to be guessed by who does not know alpha."""
        digest = hashlib.sha256(alpha.astype("<f8").tobytes())
        digest.update(self._document)
        digest.update(f"{PRODUCER.version} {self._key.id if self._key else ''}".encode())
        return digest.hexdigest()[:32]

    def _build(self, alpha: npt.NDArray[np.float64], name: str, path: Path) -> None:
        manifest = self._pool.manifest
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".building-") as folder:
            bundle = write_adapter_bundle(
                self._pool.blend(alpha),
                Path(folder) / "adapter",
                name=f"{manifest.name[:64]}-{manifest.version}-{name[:12]}",
                base_fingerprint=manifest.base_fingerprint,
                pool=manifest.origin,
            )
            if self._key is not None:
                sign(bundle, self._key)
            pack(bundle.path, path)

    def _clean(self, made: Path) -> None:
        found = []
        for path in self._cache.glob("*.crayon"):
            with suppress(FileNotFoundError):  # another process cleans too
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for asked, size, path in sorted(found):
            if total <= self._cache_bytes or asked > time.time() - _IN_USE:
                break
            if path != made:
                path.unlink(missing_ok=True)
                total -= size
