"""The routes of the service, and what is said where a request is refused.

    GET  /healthz                         no key needed
    GET  /metrics                         numbers for Prometheus
    GET  /v1/pool                         pool.json
    GET  /v1/pool/signature               signature.json over the bytes of pool.json, if the service signs
    GET  /v1/pool/projection              projection.safetensors, which pool.json holds the hash of
    POST /v1/customizations               {base_fingerprint, pool_version, alpha, …} -> a .crayon archive; see `Request`
    GET  /v1/customizations/{name}        the same archive again, by the Content-Location of the first: to resume a cut download

Whatever is refused is answered {"error": {"what", "where", "do"}}.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from crayon_runtime._version import __version__
from crayon_runtime.affinity import LARGEST_WEIGHT
from crayon_runtime.errors import CrayonError, InvalidInput
from crayon_runtime.pool import PoolManifest
from crayon_runtime.signing import KeyStore, SigningKey, sign_document
from crayon_server.service.access_log import AccessLog
from crayon_server.service.customizations import Customizations, QueueFull, Request
from crayon_server.service.limit import RateLimit
from crayon_server.service.metrics import Metrics
from crayon_server.service.pools import ServedPool

LARGEST_BODY = 64 << 10
"""Bytes. The alpha of 4096 adapters fits."""
BODY_SECONDS = 10.0
MADE_SECONDS = 30.0
"""An adapter that is not there by then is made nevertheless, for who asks again."""
CACHE_BYTES = 1 << 30

ARCHIVE = "application/vnd.crayon.bundle+zip"

_log = logging.getLogger("crayon.service")


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        wait: seconds after which to ask again.
    """

    def __init__(
        self, status: int, what: str, *, where: str | None = None, do: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(what)
        self.status = status
        self.content = {"error": {"what": what, "where": where, "do": do}}
        self.headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if wait is not None:
            self.headers["Retry-After"] = str(wait)


def create_app(
    pool: Path,
    keys: Path | None,
    *,
    cache: Path,
    cache_bytes: int = CACHE_BYTES,
    api_key: str | None = None,
    rate_limit: str | None = None,
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
    for status, what in ((404, "there is nothing at this address"), (405, "this method is not for this address")):
        app.add_exception_handler(status, _plain(status, what))
    app.add_exception_handler(Exception, _plain(500, "the service failed; its log says more"))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(CrayonError, _failed)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the service answers, and for which pool."""
        return {"status": "ok", "pool": manifest.name, "pool_version": manifest.version}

    authorized = Depends(_authorized(api_key))

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[authorized], responses=_errors(401))
    async def numbers() -> Response:
        """Numbers of requests, for Prometheus."""
        return Response(await asyncio.to_thread(metrics.render), media_type=CONTENT_TYPE_LATEST)

    guard = [authorized, Depends(_within(RateLimit(rate_limit) if rate_limit else None))]
    app.include_router(_pool_routes(served, key), dependencies=guard, responses=_errors(401, 429))
    app.include_router(_customization_routes(manifest, made, metrics), dependencies=guard, responses=_errors(401, 429))
    return app


def _within(limit: RateLimit | None) -> Callable[[HttpRequest], Awaitable[None]]:
    async def within(request: HttpRequest) -> None:
        wait = limit.wait(request.client.host if request.client else None) if limit else 0
        if wait:
            raise Refused(429, "you ask too often", do=f"ask again in {wait} s", wait=wait)

    return within


def _authorized(api_key: str | None) -> Callable[[HttpRequest], Awaitable[None]]:
    async def authorized(request: HttpRequest) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise Refused(401, "the API key is missing or wrong", where="Authorization", do="send `Bearer KEY`")

    return authorized


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

    @router.get("/v1/pool/signature", response_class=JSONResponse, responses=_errors(404))
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
        responses={200: {"content": {ARCHIVE: {}}}, **_errors(400, 408, 409, 413, 422, 503)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}},
    )
    async def customize(request: HttpRequest) -> Response:
        """The adapter bundle of one alpha."""
        wanted = _parse(await _body(request))
        if wanted.base_fingerprint != manifest.base_fingerprint:
            raise Refused(409, "this pool is for another base model", where="base_fingerprint")
        if wanted.pool_version != manifest.version:
            raise Refused(
                409,
                "this is not the version of the pool that is served",
                where="pool_version",
                do="get /v1/pool and compute alpha again",
            )
        order = made.order(wanted.alpha, wanted.dtype, wanted.rank_limit)
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
        responses={200: {"content": {ARCHIVE: {}}}, **_errors(404)},
    )
    async def again(name: str) -> Response:
        """An adapter bundle that was made a short while ago; takes Range and If-Range."""
        path = made.find(name)
        if path is None:
            raise Refused(404, "there is no such customization here now", do="post alpha again")
        return _archive(path)

    return router


async def _body(request: HttpRequest) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
    except ClientDisconnect:
        raise Refused(400, "the body was cut off") from None
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


def _parse(body: bytes) -> Request:
    try:
        return msgspec.json.decode(body, type=Request)
    except msgspec.ValidationError as e:
        raise Refused(422, str(e), where="body") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refused(400, "the body is not JSON; NaN and infinity are not", where="body") from None


def _archive(path: Path) -> Response:
    headers = _headers(path.stem) | {"Content-Location": f"/v1/customizations/{path.stem}"}
    return FileResponse(path, media_type=ARCHIVE, headers=headers)


def _headers(tag: str) -> dict[str, str]:
    return {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}


def _unless_known(request: HttpRequest, tag: str) -> Response | None:
    known = {known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")}
    return Response(status_code=304, headers=_headers(tag)) if known & {f'"{tag}"', "*"} else None


Handler = Callable[[HttpRequest, Exception], Awaitable[Response]]


def _plain(status: int, what: str) -> Handler:
    async def handle(_request: HttpRequest, error: Exception) -> Response:
        headers = getattr(error, "headers", None)
        return JSONResponse({"error": {"what": what, "where": None, "do": None}}, status, headers)

    return handle


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.content, error.status, error.headers)


async def _failed(_request: HttpRequest, error: Exception) -> Response:
    """What the library refuses is the client's fault if it is its input, and otherwise no business of the client."""
    assert isinstance(error, CrayonError)
    if isinstance(error, InvalidInput):
        return JSONResponse({"error": {"what": error.what, "where": error.where, "do": error.do}}, 422)
    _log.error("the adapter could not be made: %s", error)
    return JSONResponse(
        {"error": {"what": "the adapter could not be made", "where": None, "do": "try again later"}}, 503
    )


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    text = {"type": ["string", "null"]}
    error = {"type": "object", "properties": {"what": {"type": "string"}, "where": text, "do": text}}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    return {s: {"description": "refused", "content": {"application/json": {"schema": schema}}} for s in statuses}


def _schema(manifest: PoolManifest) -> dict[str, Any]:
    """What a body must be to be accepted by the service of this pool."""
    lowest = -LARGEST_WEIGHT if manifest.weighting.signed else 0.0
    weight = {"type": "number", "minimum": lowest, "maximum": LARGEST_WEIGHT}
    count = manifest.adapters
    (_,), components = msgspec.json.schema_components([Request])
    schema: dict[str, Any] = components["Request"]
    schema["properties"] |= {
        "base_fingerprint": {"const": manifest.base_fingerprint},
        "pool_version": {"const": manifest.version},
        "alpha": {"type": "array", "items": weight, "minItems": count, "maxItems": count},
    }
    return schema
