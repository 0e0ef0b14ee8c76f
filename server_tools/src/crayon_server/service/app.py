"""The routes of the service, and what is said where a request is refused.

    GET  /healthz                         no key needed
    GET  /metrics                         numbers for Prometheus
    GET  /v1/pool                         pool.json
    GET  /v1/pool/signature               signature.json over the bytes of pool.json, if the service signs
    GET  /v1/pool/projection              projection.safetensors, which pool.json holds the hash of
    POST /v1/customizations               {base_fingerprint, pool_version, alpha, …} -> a .crayon archive; see `Request`
    GET  /v1/customizations/{name}        the same archive again, by the Content-Location of the first: to resume a cut download

and those of `chat`, which pass queries to a server LLM. Whatever is refused is answered {"error": {"what", "where", "do"}}.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from crayon_runtime._version import __version__
from crayon_runtime.affinity import LARGEST_WEIGHT
from crayon_runtime.errors import AdapterError
from crayon_runtime.pool import PoolManifest
from crayon_runtime.server.asgi import authorized, read_body
from crayon_runtime.signing import KeyStore, SigningKey, sign_document
from crayon_server.service import chat, refusals
from crayon_server.service.access_log import AccessLog
from crayon_server.service.customizations import Customizations, QueueFull, Request
from crayon_server.service.limit import RateLimit
from crayon_server.service.metrics import Metrics
from crayon_server.service.pools import ServedPool
from crayon_server.service.refusals import Refused, described
from crayon_server.upstream import Endpoint

LARGEST_BODY = 64 << 10
"""Bytes. The alpha of 4096 adapters fits."""
MADE_SECONDS = 30.0
"""An adapter that is not there by then is made nevertheless, for who asks again."""
CACHE_BYTES = 1 << 30

ARCHIVE = "application/vnd.crayon.bundle+zip"


def create_app(
    pool: Path,
    keys: Path | None,
    *,
    cache: Path,
    cache_bytes: int = CACHE_BYTES,
    api_key: str | None = None,
    rate_limit: str | None = None,
    upstream: Endpoint | None = None,
    upstream_concurrency: int = chat.CONCURRENCY,
) -> FastAPI:
    """The service of one pool, as an ASGI application.

    What is served is the pool that is there now, whatever takes its place later.

    Args:
        pool: every hash of it is checked first.
        keys: the key store whose current key signs adapters, read once; None: they are not signed.
        cache: a folder for finished adapters, which processes may share.
        cache_bytes: how much of them to keep, about.
        api_key: what clients have to send as `Authorization: Bearer`; None: nothing.
        rate_limit: how often one address may ask, as "60/minute"; None: as often as it likes.
        upstream: the server LLM that queries are passed to; None: there is none.
        upstream_concurrency: how many queries it gets at once.

    Raises:
        CrayonError: the pool or the keys cannot be used.
    """
    served = ServedPool.open(pool)
    manifest = served.pool.manifest
    key = KeyStore.open(keys).signing_key() if keys is not None else None
    metrics = Metrics()
    made = Customizations(served.pool, served.document, key, cache, cache_bytes, metrics.made)
    app = FastAPI(title="Crayon", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(AccessLog, metrics=metrics)
    refusals.install(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the service answers, and for which pool."""
        return {"status": "ok", "pool": manifest.name, "pool_version": manifest.version}

    key_needed = Depends(authorized(api_key))

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[key_needed], responses=described(401))
    async def numbers() -> Response:
        """Numbers of requests, for Prometheus."""
        return Response(await asyncio.to_thread(metrics.render), media_type=CONTENT_TYPE_LATEST)

    guard = [key_needed, Depends(_within(RateLimit(rate_limit) if rate_limit else None))]
    app.include_router(_pool_routes(served, key), dependencies=guard, responses=described(401, 429))
    app.include_router(
        _customization_routes(manifest, made, metrics), dependencies=guard, responses=described(401, 429)
    )
    if upstream is not None:
        upstream.on_try = metrics.tried
    asked = chat.routes(upstream, concurrency=upstream_concurrency, open_to_all=api_key is None)
    app.include_router(asked, dependencies=guard)
    return app


def _within(limit: RateLimit | None) -> Callable[[HttpRequest], Awaitable[None]]:
    async def within(request: HttpRequest) -> None:
        wait = limit.wait(request.client.host if request.client else None) if limit else 0
        if wait:
            raise Refused(429, "you ask too often", do=f"ask again in {wait} s", wait=wait, code="rate_limit_exceeded")

    return within


def _pool_routes(served: ServedPool, key: SigningKey | None) -> APIRouter:
    router = APIRouter()
    digest = hashlib.sha256(served.document).hexdigest()[:32]
    signature = sign_document(served.document, key) if key is not None else None

    @router.get("/v1/pool", response_class=JSONResponse)
    async def pool_manifest(request: HttpRequest) -> Response:
        """The pool's pool.json."""
        return _unless_known(request, digest) or Response(
            served.document, media_type="application/json", headers=_headers(digest)
        )

    @router.get("/v1/pool/signature", response_class=JSONResponse, responses=described(404))
    async def pool_signature(request: HttpRequest) -> Response:
        """The signature.json over exactly the bytes of pool.json."""
        if key is None or signature is None:
            raise Refused(404, "this service does not sign")
        tag = f"{digest}-{key.id}"
        return _unless_known(request, tag) or Response(signature, media_type="application/json", headers=_headers(tag))

    @router.get("/v1/pool/projection", response_class=FileResponse)
    async def projection(request: HttpRequest) -> Response:
        """The pool's projection.safetensors."""
        return _unless_known(request, served.projection_sha256) or FileResponse(
            served.projection, media_type="application/octet-stream", headers=_headers(served.projection_sha256)
        )

    return router


def _customization_routes(manifest: PoolManifest, made: Customizations, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    body = _schema(manifest)

    @router.post(
        "/v1/customizations",
        response_class=FileResponse,
        responses={200: {"content": {ARCHIVE: {}}}, **described(400, 408, 409, 413, 422, 503)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}},
    )
    async def customize(request: HttpRequest) -> Response:
        """The adapter bundle of one alpha."""
        wanted = _parse(await read_body(request, LARGEST_BODY))
        if wanted.base_fingerprint != manifest.base_fingerprint:
            raise Refused(409, "this pool is for another base model", where="base_fingerprint")
        if wanted.pool_version != manifest.version:
            raise Refused(
                409,
                "this is not the version of the pool that is served",
                where="pool_version",
                do="get /v1/pool and compute alpha again",
            )
        if (wanted.backend == "executorch") != (wanted.slots is not None):
            raise Refused(409, "slots belong to an adapter for executorch, and only to one", where="slots")
        try:
            order = made.order(wanted.alpha, wanted.dtype, wanted.rank_limit, wanted.prototypes, wanted.slots)
        except AdapterError as e:
            raise Refused(409, e.what, where="slots", do=e.do) from None
        if (path := made.find(order.name)) is not None:
            metrics.hit()
            return _archive(path)
        try:
            async with asyncio.timeout(MADE_SECONDS):
                return _archive(await made.made(order))
        except (TimeoutError, QueueFull):
            raise Refused(503, "too many adapters are being made", do="ask again a little later", wait=5) from None

    @router.get(
        "/v1/customizations/{name}",
        response_class=FileResponse,
        responses={200: {"content": {ARCHIVE: {}}}, **described(404)},
    )
    async def again(name: str) -> Response:
        """An adapter bundle that was made a short while ago; takes Range and If-Range."""
        path = made.find(name)
        if path is None:
            raise Refused(404, "there is no such customization here now", do="post alpha again")
        return _archive(path)

    return router


def _parse(body: bytes) -> Request:
    try:
        return msgspec.convert(_whole(msgspec.json.decode(body)), Request)
    except msgspec.ValidationError as e:
        raise Refused(422, str(e), where="body") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refused(400, "the body is not JSON; NaN and infinity are not", where="body") from None


def _whole(value: Any) -> Any:
    """JSON Schema takes 8.0 for an integer; msgspec does not."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


def _archive(path: Path) -> Response:
    headers = _headers(path.stem) | {"Content-Location": f"/v1/customizations/{path.stem}"}
    return FileResponse(path, media_type=ARCHIVE, headers=headers)


def _headers(tag: str) -> dict[str, str]:
    return {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}


def _unless_known(request: HttpRequest, tag: str) -> Response | None:
    known = {known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")}
    return Response(status_code=304, headers=_headers(tag)) if known & {f'"{tag}"', "*"} else None


def _schema(manifest: PoolManifest) -> dict[str, Any]:
    """What a body must be to be accepted by the service of this pool."""
    lowest = -LARGEST_WEIGHT if manifest.weighting.signed else 0.0
    weight = {"type": "number", "minimum": lowest, "maximum": LARGEST_WEIGHT}
    count = manifest.adapters
    schema: dict[str, Any] = _inlined({"$ref": "#/$defs/Request"}, msgspec.json.schema(Request)["$defs"])
    schema["properties"] |= {
        "base_fingerprint": {"const": manifest.base_fingerprint},
        "pool_version": {"const": manifest.version},
        "alpha": {"type": "array", "items": weight, "minItems": count, "maxItems": count},
    }
    return schema


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON Schema with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}
