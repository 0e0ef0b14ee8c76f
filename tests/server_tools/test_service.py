from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crayon_runtime.bundle import install
from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.pool import Pool
from crayon_runtime.signing import KeyStore, verify_signature
from tests.runtime import pools
from tests.support import needs

httpx = needs.module("httpx")
needs.module("fastapi")
needs.module("uvicorn")

from crayon_server.cli.serve import _listen, _read_key  # noqa: E402
from crayon_server.service import app as service  # noqa: E402
from crayon_server.service.customizations import Customizations  # noqa: E402

ALPHA = [0.7, 0.2, 0.1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return pools.write(tmp_path / "pool")


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore.create(tmp_path / "keys")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def ask(pool: Pool, keys: KeyStore, cache: Path) -> Ask:
    return Ask(service.create_app(pool.path, keys.path, cache=cache), pool)


class Ask:
    """One request at a time to an application, without a network."""

    def __init__(self, app: Any, pool: Pool) -> None:
        self._app = app
        self._pool = pool

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        async def send() -> Any:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    def body(self, **changes: Any) -> dict[str, Any]:
        manifest = self._pool.manifest
        fields = {"base_fingerprint": manifest.base_fingerprint, "pool_version": manifest.version, "alpha": ALPHA}
        return fields | changes

    def customize(self, **changes: Any) -> Any:
        return self("POST", "/v1/customizations", json=self.body(**changes))


def problem(response: Any) -> str:
    error = response.json()["error"]
    assert set(error) == {"what", "where", "do"}
    return f"{response.status_code} {error['what']}"


# The pool


def test_health(ask: Ask, pool: Pool) -> None:
    assert ask("GET", "/healthz").json() == {
        "status": "ok",
        "pool": "random",
        "pool_version": pool.manifest.version,
    }


@pytest.mark.parametrize("path, file", [("/v1/pool", "pool.json"), ("/v1/pool/projection", "projection.safetensors")])
def test_the_pool_is_served_as_its_files(ask: Ask, pool: Pool, path: str, file: str) -> None:
    first = ask("GET", path)
    assert first.status_code == 200
    assert first.content == (pool.path / file).read_bytes()
    again = ask("GET", path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert ask("GET", path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_etag_follows_the_manifest(pool: Pool, ask: Ask, cache: Path, tmp_path: Path) -> None:
    other = pools.write(tmp_path / "other", blend="concat")  # the same files
    assert other.manifest.version == pool.manifest.version
    there = Ask(service.create_app(other.path, None, cache=cache), other)
    assert there("GET", "/v1/pool").headers["etag"] != ask("GET", "/v1/pool").headers["etag"]
    assert there.customize().content != ask.customize().content


# Customizations


def test_alpha_gives_a_signed_adapter(ask: Ask, pool: Pool, keys: KeyStore, tmp_path: Path) -> None:
    response = ask.customize()
    assert response.status_code == 200
    (tmp_path / "got.crayon").write_bytes(response.content)
    bundle = install(tmp_path / "got.crayon", tmp_path / "got")
    assert verify_signature(bundle, keys.trusted) == keys.current
    manifest = bundle.as_adapter
    assert manifest.base_fingerprint == pool.manifest.base_fingerprint
    assert [target.module for target in manifest.targets] == pool.manifest.targets
    assert pool.manifest.version in manifest.name


def test_the_adapter_is_the_blend_of_alpha(ask: Ask, pool: Pool, tmp_path: Path) -> None:
    import onnxruntime

    (tmp_path / "got.crayon").write_bytes(ask.customize().content)
    bundle = install(tmp_path / "got.crayon", tmp_path / "got")
    got = onnxruntime.AdapterFormat.read_adapter(str(bundle.path / "adapter.onnx_adapter")).get_parameters()
    for module, (a, b) in pool.blend(ALPHA).tensors.items():
        assert got[f"{module}.lora_A.weight"].numpy() == pytest.approx(a.T)
        assert got[f"{module}.lora_B.weight"].numpy() == pytest.approx(pool.manifest.scale * b.T)


def test_the_same_alpha_gives_the_same_bytes(ask: Ask, cache: Path) -> None:
    first = ask.customize()
    (made,) = cache.iterdir()
    before = made.stat().st_ino
    assert ask.customize(alpha=[0.70004, 0.2, 0.1]).content == first.content  # rounded
    assert made.stat().st_ino == before
    made.unlink()
    assert ask.customize().content == first.content  # made again
    assert ask.customize(alpha=[0.7002, 0.2, 0.1]).content != first.content
    assert len(list(cache.iterdir())) == 2


def test_a_cut_download_is_resumed(ask: Ask) -> None:
    whole = ask.customize()
    place, etag = whole.headers["content-location"], whole.headers["etag"]
    rest = ask("GET", place, headers={"Range": "bytes=1000-", "If-Range": etag})
    assert rest.status_code == 206
    assert whole.content[:1000] + rest.content == whole.content
    changed = ask("GET", place, headers={"Range": "bytes=1000-", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    assert ask("GET", place, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416


@pytest.mark.parametrize("name", ["0" * 32, "x", "..%2F..%2Fkeys%2Fkeys.json", "0" * 5000, "%00", "%ff"])
def test_what_was_never_made_is_not_there(ask: Ask, name: str) -> None:
    assert problem(ask("GET", f"/v1/customizations/{name}")).startswith("404")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alpha": [0.5, 0.5]}, "422 alpha has shape [2]; this pool has 3 adapters"),
        ({"alpha": []}, "422 alpha has shape [0]"),
        ({"alpha": [1, 0, -0.1]}, "422 weight 2 is -0.1"),
        ({"alpha": [1e30, 0, 0]}, "422 weight 0 is"),
        ({"alpha": [1e300, 0, 0]}, "422 weight 0 is"),
        ({"alpha": [0.1] * 4097}, "422 Expected `array` of length <= 4096"),
        ({"alpha": [[0.1], 0.2, 0.3]}, "422 Expected `float`, got `array`"),
        ({"alpha": ["0.1", 0.2, 0.3]}, "422 Expected `float`, got `str`"),
        ({"alpha": [True, 0, 0]}, "422 Expected `float`, got `bool`"),
        ({"alpha": None}, "422 Expected `array`, got `null`"),
        ({"text": "something private"}, "422 Object contains unknown field `text`"),
        ({"base_fingerprint": "x"}, "422 Expected `str` matching regex"),
        ({"base_fingerprint": "0" * 64}, "409 this pool is for another base model"),
        ({"pool_version": "0" * 16}, "409 this is not the version of the pool that is served"),
    ],
)
def test_what_cannot_be_blended_is_refused(ask: Ask, cache: Path, changes: dict[str, Any], message: str) -> None:
    assert problem(ask.customize(**changes)).startswith(message)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 60_000,
        b"{" + b'"a":{' * 9000,
        b'{"alpha": [NaN]}',
        b'{"alpha": [-Infinity, 1, 1]}',
    ],
)
def test_what_is_not_json_is_refused(ask: Ask, content: bytes) -> None:
    assert problem(ask("POST", "/v1/customizations", content=content))[:3] in ("400", "422")


@pytest.mark.parametrize("number", [b"1e999", b"1" + b"0" * 400, b"-1e999"])
def test_numbers_that_are_no_float_are_refused(ask: Ask, number: bytes) -> None:
    content = msgspec.json.encode(ask.body()).replace(b"0.7", number)
    assert problem(ask("POST", "/v1/customizations", content=content))[:3] in ("400", "422")


def test_a_large_body_is_refused(ask: Ask) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b" " * 10_000

    assert problem(ask("POST", "/v1/customizations", content=endless())).startswith("413")
    assert sent <= service.LARGEST_BODY + 20_000


def test_a_slow_body_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    start = time.monotonic()
    assert problem(ask("POST", "/v1/customizations", content=slow())).startswith("408")
    assert time.monotonic() - start < 2


def test_other_addresses_and_methods(ask: Ask) -> None:
    assert problem(ask("GET", "/v2/pool")).startswith("404")
    wrong = ask("DELETE", "/v1/pool")
    assert problem(wrong).startswith("405")
    assert wrong.headers["allow"] == "GET"


def test_a_damaged_pool_is_the_services_fault(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutputError("the disk is full", where="a/private/path")

    monkeypatch.setattr(Customizations, "_build", full)
    response = ask.customize()
    assert problem(response) == "503 the adapter could not be made"
    assert "private" not in response.text

    def bug(*_: object) -> None:
        raise ZeroDivisionError("private")

    monkeypatch.setattr(Customizations, "_build", bug)
    response = ask.customize()
    assert problem(response) == "500 the service failed; its log says more"
    assert "private" not in response.text


def test_old_archives_are_removed_above_the_limit(pool: Pool, cache: Path) -> None:
    made = Customizations(pool, None, cache, cache_bytes=1)
    old = made.make([1, 0, 0])
    recent = made.make([0, 1, 0])
    assert old.exists()  # somebody may be fetching it
    os.utime(old, (1, 1))
    made.make([0, 0, 1])
    assert not old.exists()
    assert recent.exists()


def test_what_is_there_does_not_wait_for_what_is_being_made(pool: Pool, cache: Path) -> None:
    made = Customizations(pool, None, cache, cache_bytes=1 << 20)
    path = made.make(ALPHA)
    with made._building:
        assert made.make(ALPHA) == path


# Keys


def test_without_keys_adapters_are_not_signed(pool: Pool, cache: Path, tmp_path: Path) -> None:
    ask = Ask(service.create_app(pool.path, None, cache=cache), pool)
    (tmp_path / "got.crayon").write_bytes(ask.customize().content)
    assert not (install(tmp_path / "got.crayon", tmp_path / "got").path / "signature.json").exists()


def test_a_service_with_a_bad_key_does_not_start(pool: Pool, keys: KeyStore, cache: Path) -> None:
    keys.revoke(keys.keys[0].id)
    with pytest.raises(InvalidInput, match="every key is revoked"):
        service.create_app(pool.path, keys.path, cache=cache)


def test_the_api_key(pool: Pool, cache: Path) -> None:
    ask = Ask(service.create_app(pool.path, None, cache=cache, api_key="correct horse battery"), pool)
    assert ask("GET", "/healthz").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": b"Bearer \xff"}, {"Authorization": ""}):
        refused = ask("GET", "/v1/pool", headers=headers)
        assert problem(refused).startswith("401")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert problem(ask.customize()).startswith("401")
    right = {"Authorization": "Bearer correct horse battery"}
    assert ask("GET", "/v1/pool", headers=right).status_code == 200


def test_api_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("correct horse battery\n")
    assert _read_key(path) == "correct horse battery"
    for content in (b"short", b"two lines of\nletters and more", "schlüsselschlüssel".encode()):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="API key"):
            _read_key(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        _read_key(tmp_path / "absent")


# What others see


def test_the_log_tells_nothing_of_users(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="crayon.service"):
        sent = len(ask.customize().content)
        ask.customize(secret="0.123456")
        ask("GET", "/secret?secret=0.123456")
        ask("GET", "/v1/customizations/secret")
        ask("SECRET", "/healthz")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "crayon.service"]
    assert [(line["method"], line["status"]) for line in lines] == [
        ("POST", 200), ("POST", 422), ("GET", 404), ("GET", 404), ("-", 405),
    ]  # fmt: skip
    assert lines[0]["bytes"] == sent
    assert [line["route"] for line in lines[1:4]] == ["/v1/customizations", "-", "/v1/customizations/{name}"]
    assert "secret" not in caplog.text.lower()
    assert "0.1" not in json.dumps([{**line, "ms": None} for line in lines])


def test_openapi_describes_the_request(ask: Ask) -> None:
    document = ask("GET", "/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz",
        "/v1/pool",
        "/v1/pool/projection",
        "/v1/customizations",
        "/v1/customizations/{name}",
    }
    body = document["paths"]["/v1/customizations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["base_fingerprint", "pool_version", "alpha"]
    assert body["additionalProperties"] is False
    alpha = body["properties"]["alpha"]
    assert (alpha["minItems"], alpha["maxItems"], alpha["items"]["minimum"]) == (3, 3, 0)


def test_requests_made_from_the_openapi_document(pool: Pool, cache: Path) -> None:
    schemathesis = needs.module("schemathesis")
    hypothesis = needs.module("hypothesis")
    app = service.create_app(pool.path, None, cache=cache)
    accepted = 0

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def check(case: Any) -> None:
        nonlocal accepted
        accepted += case.call_and_validate().status_code == 200 and case.method == "POST"

    for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        hypothesis.given(case=operation.ok().as_strategy())(check)()
    assert accepted > 3


# crayon serve


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_serve_answers_over_a_socket(
    pool: Pool, keys: KeyStore, tmp_path: Path, ask: Ask, stop: signal.Signals
) -> None:
    program = "import sys; from crayon_server.cli.serve import serve; serve(sys.argv[1:])"
    args = [sys.executable, "-c", program, str(pool.path), "--port", "0", "--keys", str(keys.path)]
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().strip().rpartition("http://")[2]
        client = http.client.HTTPConnection(address, timeout=20)
        client.request("POST", "/v1/customizations", json.dumps(ask.body()))
        response = client.getresponse()
        content = response.read()
        assert response.status == 200
        assert response.getheader("Content-Length") == str(len(content))
        assert content == ask.customize().content  # another process, the same bytes
        (tmp_path / "got.crayon").write_bytes(content)
        verify_signature(install(tmp_path / "got.crayon", tmp_path / "got"), keys.trusted)
        client.close()
    finally:
        process.send_signal(stop)
        rest = process.communicate(timeout=20)[1]
    assert "Traceback" not in rest
    assert json.loads(rest.splitlines()[0])["status"] == 200
    assert list((tmp_path / "temporary").iterdir()) == []  # nobody's adapter stays behind


def test_an_address_that_is_taken() -> None:
    with _listen("127.0.0.1", 0) as first, pytest.raises(OutputError, match="cannot be listened on"):
        _listen("127.0.0.1", first.getsockname()[1])
