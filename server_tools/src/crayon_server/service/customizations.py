"""Adapters made to order: blended, signed, packed, and kept in a folder for who asks for the same again."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from crayon_runtime.affinity import check_alpha
from crayon_runtime.backends.executorch_adapter import check_fit, nbytes
from crayon_runtime.blend import Blended, onnx_tensors
from crayon_runtime.bundle import write_adapter_archive
from crayon_runtime.errors import AdapterError, OutputError
from crayon_runtime.manifest import MOST_PROTOTYPES, PRODUCER, AdapterDtype, PoolVersion, ProgramSlots, Sha256
from crayon_runtime.prototypes import SIZE
from crayon_runtime.signing import sign_document

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.pool import Pool
    from crayon_runtime.signing import SigningKey

    Doubles = npt.NDArray[np.float64]

DECIMALS = 4
"""Of alpha. Noise of 0.02 costs at most two points of exact match on the generated benchmark, so this costs nothing."""
LARGEST_RANK = 1 << 16
LARGEST_DATA = 1 << 31
"""Bytes of an adapter for ExecuTorch."""
LONGEST_QUEUE = 32
"""Adapters that wait to be made. At 7B, one takes less than a second."""

_LOOKS = 16  # how often a full cache's worth of archives is looked through
_IN_USE = 60.0  # seconds for which what was asked for is not removed


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request: all that a device tells about its user."""

    base_fingerprint: Sha256
    pool_version: PoolVersion
    alpha: Annotated[list[float], Meta(max_length=4096, description="the weight of each adapter of the pool")]
    backend: Literal["onnx", "executorch"] = "onnx"
    """Whom the adapter is for."""
    dtype: Annotated[AdapterDtype, Meta(description="what an adapter for onnx is stored in")] = "fp16"
    # JSON Schema takes 8.0 for an integer; msgspec does not.
    rank_limit: Annotated[float, Meta(ge=1, le=LARGEST_RANK, multiple_of=1)] | None = None
    """An adapter of a larger rank is truncated to it."""
    prototypes: Annotated[
        float,
        Meta(
            ge=0,
            le=MOST_PROTOTYPES,
            multiple_of=1,
            description="how many come with the adapter, if the pool has as many",
        ),
    ] = SIZE
    slots: Annotated[ProgramSlots | None, Meta(description="of the device's program; for executorch")] = None
    """An adapter of a larger rank is truncated to theirs."""


@dataclass(frozen=True)
class Order:
    """An adapter that can be made."""

    name: str
    """32 hex digits, which nobody can guess who does not know alpha."""
    alpha: Doubles
    """float64 [N], rounded."""
    blended: Blended
    dtype: AdapterDtype
    prototypes: int
    """How many come with it."""
    slots: ProgramSlots | None
    """That it fills; None: it is for ONNX Runtime."""


class QueueFull(Exception):
    """Too many adapters wait to be made."""


class Customizations:
    """The archives of one pool. Threads and processes may share a folder.

    Args:
        document: the bytes of the pool's pool.json.
        key: signs the adapters; None: they are not signed.
        cache: the folder of the archives. What dead processes left there half-made is removed.
        cache_bytes: above this, archives that nobody asked for in the last minute are removed, the oldest first.
        on_made: called with the seconds that an archive took.
    """

    def __init__(
        self,
        pool: Pool,
        document: bytes,
        key: SigningKey | None,
        cache: Path,
        cache_bytes: int,
        on_made: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._key = key
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._on_made = on_made
        self._context = document + f"{PRODUCER.version} {key.id if key else ''}".encode()
        self._building = threading.Lock()  # a blend keeps the memory bus busy; two at once are no faster
        self._unseen = cache_bytes  # bytes since the folder was looked through
        self._waiting: dict[str, asyncio.Task[Path]] = {}
        _remove_leftovers(cache)

    def order(
        self,
        alpha: list[float],
        dtype: AdapterDtype = "fp16",
        rank_limit: float | None = None,
        prototypes: float = SIZE,
        slots: ProgramSlots | None = None,
    ) -> Order:
        """What is asked for by alpha, rounded to `DECIMALS`. Nothing is computed.

        Args:
            dtype: of an adapter for ONNX Runtime.
            slots: for an adapter for ExecuTorch.

        Raises:
            InvalidInput: alpha cannot be blended.
            AdapterError: the blend does not fit the slots.
        """
        manifest = self._pool.manifest
        checked = check_alpha(alpha, manifest.adapters, signed=manifest.weighting.signed)
        rounded = np.asarray(checked, np.float64).round(DECIMALS) + 0.0  # -0 becomes 0
        blended = self._pool.blend(rounded)
        if rank_limit is not None:
            blended = blended.limited(int(rank_limit))
        if slots is not None:
            blended = blended.limited(slots.rank)
            check_fit(onnx_tensors(blended), slots)
            if nbytes(slots) > LARGEST_DATA:
                raise AdapterError(f"the slots hold {nbytes(slots)} bytes, more than {LARGEST_DATA}")
        count = min(int(prototypes), manifest.prototypes.count) if manifest.prototypes else 0
        digest = hashlib.sha256(rounded.astype("<f8").tobytes())
        stored = dtype.encode() if slots is None else msgspec.json.encode(slots)
        digest.update(stored + f" {blended.rank} {count} ".encode() + self._context)
        return Order(digest.hexdigest()[:32], rounded, blended, dtype, count, slots)

    def find(self, name: str) -> Path | None:
        """An archive that was made before and is still here, by the name of its order."""
        if not re.fullmatch("[0-9a-f]{32}", name):
            return None
        path = self._cache / f"{name}.crayon"
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    async def made(self, order: Order) -> Path:
        """The archive of an order; the same order gives the same bytes. Whoever stops waiting does not stop the others.

        Raises:
            QueueFull: try again later.
            CrayonError: the pool is damaged, or the disk is full.
        """
        if (found := self.find(order.name)) is not None:
            return found
        task = self._waiting.get(order.name)
        if task is None:
            if len(self._waiting) >= LONGEST_QUEUE:
                raise QueueFull
            task = asyncio.create_task(asyncio.to_thread(self.make, order))
            self._waiting[order.name] = task
            task.add_done_callback(lambda done: (self._waiting.pop(order.name), done.cancelled() or done.exception()))
        return await asyncio.shield(task)

    def make(self, order: Order) -> Path:
        """As `made`, for threads."""
        with self._building:
            if (found := self.find(order.name)) is not None:  # somebody made it meanwhile
                return found
            started = time.perf_counter()
            path = self._cache / f"{order.name}.crayon"
            try:
                self._build(order, path)
            except OutputError:
                if not self._clean(None, 0):
                    raise
                self._build(order, path)  # in the place of older ones: the disk was full
            self._unseen += path.stat().st_size
            if _LOOKS * self._unseen >= self._cache_bytes:
                self._clean(path, self._cache_bytes)
                self._unseen = 0
            self._on_made(time.perf_counter() - started)
        return path

    def _build(self, order: Order, path: Path) -> None:
        manifest, prototypes = self._pool.manifest, self._pool.prototypes
        write_adapter_archive(
            path,
            onnx_tensors(order.blended),
            name=f"{manifest.name[:64]}-{manifest.version}-{order.name[:12]}",
            base_fingerprint=manifest.base_fingerprint,
            dtype=order.dtype if order.slots is None else None,
            executorch=order.slots,
            pool=manifest.origin,
            prototypes=prototypes.picked(order.alpha, order.prototypes) if prototypes else None,
            sign=partial(sign_document, key=self._key) if self._key is not None else None,
        )

    def _clean(self, made: Path | None, keep: int) -> int:
        """Remove archives, the oldest first, until no more than `keep` bytes are left; returns how many were removed."""
        found = []
        for path in self._cache.glob("*.crayon"):
            with suppress(FileNotFoundError):  # another process cleans too
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total, removed = sum(size for _, size, _ in found), 0
        for asked, size, path in sorted(found):
            if total <= keep or asked > time.time() - _IN_USE:
                break
            if path != made:
                path.unlink(missing_ok=True)
                total -= size
                removed += 1
        return removed


def _remove_leftovers(cache: Path) -> None:
    """Remove what no process is writing any more: a writer locks its file, and a dead one holds no lock."""
    for path in cache.glob(".*.crayon.partial-*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
