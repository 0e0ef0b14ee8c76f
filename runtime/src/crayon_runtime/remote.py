"""A customization service, as a device sees it: its pool comes down, alpha goes up, an adapter comes down.

Nothing that a service says is believed before it is checked: the pool and the adapter must be signed by a trusted key, of one build,
for this base, and no larger than the pool explains. What describes the pool is kept, so that the next visit moves a few bytes:

    CACHE/pool.json                pool.json with its ETag and signature, as `_Kept`
    CACHE/projection-SHA256.safetensors
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import msgspec
from msgspec import Struct

from crayon_runtime.address import checked_key, checked_url
from crayon_runtime.backends.executorch_adapter import nbytes
from crayon_runtime.bundle import Bundle, install
from crayon_runtime.bundle.archive import Archive
from crayon_runtime.bundle.checks import read_source
from crayon_runtime.bundle.source import read_signature
from crayon_runtime.download import Connection
from crayon_runtime.errors import AdapterError, IntegrityError, ManifestError, ServerError, SignatureError
from crayon_runtime.files import CHUNK, atomic_file, sha256_file
from crayon_runtime.manifest import AdapterManifest, BlendedFrom, ProgramSlots, Sha256
from crayon_runtime.pool import PROJECTION, WEIGHTS, PoolManifest, parse_manifest, read_projection
from crayon_runtime.prototypes import FILE as PROTOTYPES
from crayon_runtime.prototypes import SIZE
from crayon_runtime.signing import TrustedKeys, verify_document

if TYPE_CHECKING:
    from crayon_runtime.affinity import Projection

TIMEOUT = 30.0
"""Seconds."""

DEADLINE = 900.0
"""Seconds: 50 MB at 0.5 Mbit/s, about."""

_LARGEST_POOL = 16 << 20
_LARGEST_SIGNATURE = 4096
_LARGEST_PROJECTION = 512 << 20
_LARGEST_ADAPTER = 2 << 30  # of an .onnx_adapter file
_SLACK = 4 << 20  # an archive's manifest and headers, and those of a .ptd file


class PoolClient:
    """A service, and the pool that it serves. Use it in a `with` block.

    Args:
        url: of the service; https, or http to this machine.
        trusted: whose signatures are accepted; None: nothing has to be signed.
        api_key: sent as `Authorization: Bearer`.
        cache: a folder for what describes the pool; None: it is not kept.
        plain_http: allow http to other machines, where everybody on the way can read alpha and the key.
        timeout, deadline: see `Connection`.
        on_send: called with the body that asks for an adapter, before it is sent.
        on_bytes: called with the number of bytes of the adapter that came since the last call.

    Raises:
        InvalidInput: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        trusted: TrustedKeys | None,
        api_key: str | None = None,
        cache: Path | None = None,
        plain_http: bool = False,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
        on_send: Callable[[bytes], object] = lambda _: None,
        on_bytes: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.url, direct = checked_url(
            url,
            plain_http=plain_http,
            exposed="alpha is a fingerprint of the user, and everybody on the way could read it",
        )
        self.trusted = trusted
        self.seconds: dict[str, float] = {}
        """What fetching took, by part: pool, request, download, verify."""
        self._connection = Connection(
            self.url, api_key=checked_key(api_key), timeout=timeout, deadline=deadline, direct=direct
        )
        self._temporary = tempfile.TemporaryDirectory(prefix="crayon-") if cache is None else None
        self._cache = Path(self._temporary.name if self._temporary else cache or "")
        self._on_send, self._on_bytes = on_send, on_bytes
        self._manifest: PoolManifest | None = None
        self._projection: Projection | None = None

    @property
    def sent_bytes(self) -> int:
        """Of all requests' bodies so far."""
        return self._connection.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Of all answers' bodies so far."""
        return self._connection.received_bytes

    @property
    def manifest(self) -> PoolManifest:
        """The pool's manifest; fetched when it is first asked for.

        Raises:
            ServerError: the service cannot be reached, or has no pool.
            SignatureError: no trusted key has signed it.
            ManifestError, IntegrityError: it cannot be used.
        """
        if self._manifest is None:
            with self._part("pool"):
                self._manifest = self._fetch_manifest()
        return self._manifest

    @property
    def projection(self) -> Projection:
        """What alpha is computed with; fetched when it is first asked for. Raises as `manifest`."""
        if self._projection is None:
            manifest = self.manifest
            with self._part("pool"):
                self._projection = self._fetch_projection(manifest)
        return self._projection

    def refresh(self) -> None:
        """Forget the pool, so that it is fetched again if it changed."""
        self._manifest = self._projection = None

    def adapter(self, body: Mapping[str, Any], out: Path) -> Bundle:
        """Ask for an adapter, check it, and unpack it to `out`. While it comes it lies beside that.

        Args:
            body: `base_fingerprint`, `pool_version`, `alpha`, and what else the service takes.

        Raises:
            PoolChanged: the service has another pool now.
            ServerError: it refuses, cannot be reached any more, or sends something else.
            SignatureError: no trusted key has signed the adapter.
            BundleError, AdapterError: it is damaged, or was not made for this base of this pool.
            OutputError: the disk is full.
        """
        prototypes = min(
            body.get("prototypes", SIZE), self.manifest.prototypes.count if self.manifest.prototypes else 0
        )
        slots = msgspec.convert(body["slots"], ProgramSlots) if "slots" in body else None
        adapter = _largest_adapter(self.manifest) if slots is None else nbytes(slots) + _SLACK
        largest = adapter + (_prototypes_bytes(self.manifest) if prototypes else 0)
        content = msgspec.json.encode(body)
        self._on_send(content)
        archive = out.with_name(f"{out.name}.crayon")
        started = answered = time.perf_counter()

        def answer() -> None:
            nonlocal answered
            answered = time.perf_counter()

        try:
            with archive.open("w+b") as file:
                got = self._connection.fetch(
                    "v1/customizations", file, largest, body=content, on_answer=answer, on_bytes=self._on_bytes
                )
            assert got.status == 200
            self.seconds["request"] = answered - started
            self.seconds["download"] = time.perf_counter() - answered
            with self._part("verify"):
                self._check(archive, largest, prototypes)
                return install(archive, out)
        finally:
            archive.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _fetch_manifest(self) -> PoolManifest:
        kept = self._read_kept()
        found = self._newest(kept)
        if self.trusted is not None:
            try:
                found = self._verified(found, self.trusted)
            except SignatureError:
                # The pool may have changed between the two requests, or the key since the last visit.
                found = msgspec.structs.replace(self._newest(found), signature=None)
                found = self._verified(found, self.trusted)
        manifest = parse_manifest(found.document, where=f"{self.url}/v1/pool")
        if found != kept:
            with atomic_file(self._cache / _POOL) as file:
                file.write(msgspec.json.encode(found))
        return manifest

    def _verified(self, found: _Kept, trusted: TrustedKeys) -> _Kept:
        """With its signature, which is of a trusted key."""
        signature = found.signature or self._fetch_signature()
        verify_document(found.document, signature, trusted, where=self.url)
        return msgspec.structs.replace(found, signature=signature)

    def _newest(self, kept: _Kept | None) -> _Kept:
        """The pool.json that is served: the one that is kept, if it did not change."""
        file = io.BytesIO()
        got = self._connection.fetch("v1/pool", file, _LARGEST_POOL, known=kept.etag if kept else None)
        if got.status == 304 and kept is not None:
            return kept
        if got.status != 200:
            raise ServerError(
                f"there is no customization service here (HTTP status {got.status})",
                where=self.url,
                do="check the address",
            )
        document = file.getvalue()
        return _Kept(self.url, got.etag, document, hashlib.sha256(document).hexdigest(), None)

    def _fetch_signature(self) -> bytes:
        file = io.BytesIO()
        if self._connection.fetch("v1/pool/signature", file, _LARGEST_SIGNATURE).status != 200:
            raise SignatureError(
                "the service does not sign its pool",
                where=self.url,
                do="ask whoever runs it to serve with --keys; or accept what is not signed, with --unsigned",
            )
        return file.getvalue()

    def _fetch_projection(self, manifest: PoolManifest) -> Projection:
        wanted = next(file for file in manifest.files if file.path == PROJECTION)
        path = self._cache / f"projection-{wanted.sha256}.safetensors"
        if not path.is_file() or path.stat().st_size != wanted.size or sha256_file(path) != wanted.sha256:
            if wanted.size > _LARGEST_PROJECTION:
                raise IntegrityError(f"its projection has {wanted.size} bytes, which is too much", where=self.url)
            with atomic_file(path) as file:
                self._connection.fetch("v1/pool/projection", file, wanted.size)
                file.flush()
                if _sha256(file) != wanted.sha256:
                    raise IntegrityError(
                        "its projection is not the one that its pool.json describes",
                        where=self.url,
                        do="try again; the service may just have changed its pool",
                    )
            for other in self._cache.glob("projection-*.safetensors"):
                if other != path:
                    other.unlink(missing_ok=True)
        return read_projection(path, manifest)

    def _read_kept(self) -> _Kept | None:
        try:
            kept = msgspec.json.decode((self._cache / _POOL).read_bytes(), type=_Kept)
        except (OSError, ValueError, RecursionError):
            return None
        whole = hashlib.sha256(kept.document).hexdigest() == kept.sha256
        return kept if whole and kept.url == self.url else None

    def _check(self, archive: Path, largest: int, prototypes: int) -> None:
        """Refuse an archive that is not an adapter of this pool, before anything of it is unpacked."""
        with Archive(archive) as source:
            document, manifest = read_source(source)
            signature = read_signature(source)
        if self.trusted is not None:
            if signature is None:
                raise SignatureError("the adapter is not signed", where=self.url, do="ask whoever runs the service")
            verify_document(document, signature, self.trusted, where=self.url)
        if not isinstance(manifest, AdapterManifest):
            raise ManifestError("the service sent a model, not an adapter", where=self.url)
        if manifest.base_fingerprint != self.manifest.base_fingerprint:
            raise AdapterError(
                f"the service sent an adapter of another base model ({manifest.base_fingerprint[:12]}…)",
                where=self.url,
            )
        if manifest.pool != self.manifest.origin:
            raise AdapterError(
                f"the service sent an adapter of {_pool_text(manifest.pool)}, not of {_pool_text(self.manifest.origin)}",
                where=self.url,
                do="try again; the service may just have changed its pool",
            )
        if manifest.prototypes is not None and manifest.prototypes.count > prototypes:
            raise AdapterError(
                f"the service sent {manifest.prototypes.count} prototypes; {prototypes} could be asked for",
                where=self.url,
            )
        if sum(file.size for file in manifest.files) > largest:
            raise IntegrityError(f"the adapter unpacks to more than {largest} bytes", where=self.url)


_POOL = "pool.json"


class _Kept(Struct, frozen=True):
    """What is known of a service's pool."""

    url: str
    etag: str | None
    document: bytes
    sha256: Sha256
    signature: bytes | None


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _largest_adapter(manifest: PoolManifest) -> int:
    """Bytes that an adapter of a pool can have: in float32, while the pool may be float16; of N ranks, if it is concatenated."""
    largest = max(file.size for file in manifest.files if file.path.endswith(f"/{WEIGHTS}"))
    ranks = manifest.adapters if manifest.blend == "concat" else 1
    return min(2 * largest * ranks, _LARGEST_ADAPTER) + _SLACK


def _prototypes_bytes(manifest: PoolManifest) -> int:
    """That the prototypes of an adapter can have: a pool has no fewer."""
    return next(file.size for file in manifest.files if file.path == PROTOTYPES)


def _pool_text(pool: BlendedFrom | None) -> str:
    return f"pool {pool.name} {pool.version}" if pool else "no pool"
