from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_runtime.bundle import install
from crayon_runtime.errors import IntegrityError, InvalidInput, ManifestError, OutputError
from crayon_runtime.pool import Pool
from crayon_runtime.prototypes import read_prototypes
from crayon_runtime.signing import KeyStore, verify_document, verify_signature
from tests.runtime import pools
from tests.support import needs

httpx = needs.module("httpx")
needs.module("fastapi")
uvicorn = needs.module("uvicorn")
needs.module("limits")
needs.module("prometheus_client")
fsspec = needs.module("fsspec")

from crayon_runtime.server import asgi  # noqa: E402
from crayon_runtime.server.asgi import read_key  # noqa: E402
from crayon_server.cli.serve import _config, _listen  # noqa: E402
from crayon_server.service import access_log  # noqa: E402
from crayon_server.service import app as service  # noqa: E402
from crayon_server.service import pools as pools_module  # noqa: E402
from crayon_server.service.customizations import Customizations, QueueFull  # noqa: E402
from crayon_server.service.limit import RateLimit  # noqa: E402
from crayon_server.service.metrics import Metrics  # noqa: E402
from crayon_server.service.pools import ServedPool, fetch_pool  # noqa: E402

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
    other = pools.write(tmp_path / "other", settings={"seed": 1})
    assert other.manifest.version == pool.manifest.version
    there = Ask(service.create_app(other.path, None, cache=cache), other)
    assert there("GET", "/v1/pool").headers["etag"] != ask("GET", "/v1/pool").headers["etag"]
    assert there.customize().headers["etag"] != ask.customize().headers["etag"]


def test_the_signature_of_the_pool(ask: Ask, pool: Pool, keys: KeyStore, cache: Path) -> None:
    document, signature = ask("GET", "/v1/pool"), ask("GET", "/v1/pool/signature")
    assert verify_document(document.content, signature.content, keys.trusted, where="here") == keys.current
    again = ask("GET", "/v1/pool/signature", headers={"If-None-Match": signature.headers["etag"]})
    assert again.status_code == 304
    unsigned = Ask(service.create_app(pool.path, None, cache=cache), pool)
    assert problem(unsigned("GET", "/v1/pool/signature")) == "404 this service does not sign"


def test_a_pool_that_takes_the_place_of_another_is_not_mixed_with_it(pool: Pool, ask: Ask, tmp_path: Path) -> None:
    before = [ask("GET", path).content for path in ("/v1/pool", "/v1/pool/projection")]
    adapter = ask.customize(dtype="fp32").content
    pools.write(pool.path, adapters=pools.loras(seed=7), located=pools.projection(seed=7), replace=True)
    assert [ask("GET", path).content for path in ("/v1/pool", "/v1/pool/projection")] == before
    rest = ask("GET", "/v1/pool/projection", headers={"Range": "bytes=8-"})
    assert (rest.status_code, rest.content) == (206, before[1][8:])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    assert ask.customize(dtype="fp32").content == adapter
    other = Ask(service.create_app(pool.path, None, cache=tmp_path / "cache"), Pool.open(pool.path))
    assert [other("GET", path).content for path in ("/v1/pool", "/v1/pool/projection")] != before


def test_a_pool_that_is_replaced_while_it_is_opened(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Pool.open(pool.path)
    pools.write(pool.path, adapters=pools.loras(seed=7), replace=True)
    monkeypatch.setattr("crayon_server.service.pools.Pool.open", lambda *_, **__: opened)
    with pytest.raises(IntegrityError, match="replaced while it was opened"):
        ServedPool.open(pool.path)


@pytest.mark.parametrize("file", ["adapters/001/adapter_model.safetensors", "projection.safetensors"])
def test_a_truncated_pool_is_not_served(pool: Pool, cache: Path, file: str) -> None:
    os.truncate(pool.path / file, 100)
    with pytest.raises(IntegrityError, match=f"{file} has 100 bytes"):
        service.create_app(pool.path, None, cache=cache)


# Pools from elsewhere


@pytest.fixture
def remote(pool: Pool) -> Iterator[str]:
    """The pool, in memory of this process."""
    files = fsspec.filesystem("memory")
    files.put(f"{pool.path}/", "/there/pool/", recursive=True)
    yield "memory://there/pool"
    files.rm("/there", recursive=True)


def test_a_pool_from_elsewhere(pool: Pool, remote: str, tmp_path: Path) -> None:
    fetched = fetch_pool(remote, tmp_path / "pools")
    assert Pool.open(fetched, verify=True).manifest == pool.manifest
    assert (fetched / "pool.json").read_bytes() == (pool.path / "pool.json").read_bytes()
    inodes = {path: path.stat().st_ino for path in fetched.rglob("*.safetensors")}
    assert fetch_pool(f"{remote}/", tmp_path / "pools") == fetched
    assert inodes == {path: path.stat().st_ino for path in fetched.rglob("*.safetensors")}, "it was there"


def test_a_cut_fetch_goes_on_where_it_stopped(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fetch_pool(remote, tmp_path / "whole")
    starts = []
    append = pools_module._append

    def cut(files: Any, source: str, out: Any, start: int, end: int, place: str) -> None:
        append(files, source, out, start, end // 2 if "001" in source else end, place)
        if "001" in source:
            raise InvalidInput("the line is cut")

    monkeypatch.setattr(pools_module, "_append", cut)
    with pytest.raises(InvalidInput, match="cut"):
        fetch_pool(remote, tmp_path / "pools")
    (partial,) = (tmp_path / "pools").iterdir()
    with pytest.raises(ManifestError, match="no pool here"):
        Pool.open(partial)

    def counted(files: Any, source: str, out: Any, start: int, *rest: Any) -> None:
        starts.append(start)
        append(files, source, out, start, *rest)

    monkeypatch.setattr(pools_module, "_append", counted)
    fetched = fetch_pool(remote, tmp_path / "pools")
    assert starts[0] > 0
    for path in whole.rglob("*.*"):
        assert (fetched / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "longer", "cut and flipped"])
def test_what_is_damaged_here_is_fetched_again(pool: Pool, remote: str, tmp_path: Path, damage: str) -> None:
    fetched = fetch_pool(remote, tmp_path / "pools")
    path = fetched / "adapters/001/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes({"flipped": content, "longer": content + b"x", "cut and flipped": content[:300]}[damage])
    assert Pool.open(fetch_pool(remote, tmp_path / "pools"), verify=True).manifest == pool.manifest


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_what_is_damaged_there_is_refused(remote: str, tmp_path: Path, damage: str) -> None:
    files = fsspec.filesystem("memory")
    name = "/there/pool/adapters/001/adapter_model.safetensors"
    content = bytearray(files.cat_file(name))
    content[-3] ^= 1
    files.rm_file(name)
    if damage != "missing":
        files.pipe_file(name, bytes(content if damage == "flipped" else content[:-9]))
    with pytest.raises((IntegrityError, InvalidInput), match="is not what pool.json says|cannot be read"):
        fetch_pool(remote, tmp_path / "pools")


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://nothing/here", "FileNotFoundError"),
        ("gopher://somewhere/pool", "ValueError"),
        ("http://user:secret@127.0.0.1:1/pool?token=secret", "cannot be read"),
        ("s3://bucket/pool", "cannot be read"),
    ],
)
def test_a_place_that_cannot_be_read(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        fetch_pool(url, tmp_path / "pools")
    assert "secret" not in str(caught.value)


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

    (tmp_path / "got.crayon").write_bytes(ask.customize(dtype="fp32").content)
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


def test_prototypes_come_with_the_adapter(pool: Pool, keys: KeyStore, cache: Path, tmp_path: Path) -> None:
    made = pools.prototypes((0,) * 40 + (1,) * 40 + (2,) * 40)
    there = pools.write(tmp_path / "other", server=made)
    ask = Ask(service.create_app(there.path, keys.path, cache=cache), there)
    for asked, count in ((None, 64), (0, 0), (5, 5), (120, 120), (1024, 120), (64.0, 64)):
        response = ask.customize(**{} if asked is None else {"prototypes": asked})
        assert response.status_code == 200
        (tmp_path / "got.crayon").write_bytes(response.content)
        bundle = install(tmp_path / "got.crayon", tmp_path / "got", replace=True)
        assert verify_signature(bundle, keys.trusted) == keys.current
        found, expected = read_prototypes(bundle, 8), made.picked(ALPHA, count)
        assert (found is None) == (expected is None)
        if found and expected:
            np.testing.assert_array_equal(found.states, expected.states)
    assert len(list(cache.iterdir())) == 4, "what is the same is made once"
    there = Ask(service.create_app(pool.path, keys.path, cache=cache), pool)
    assert there.customize(prototypes=5).content == there.customize().content


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
        ({"backend": "tflite"}, "422 Invalid enum value 'tflite'"),
        ({"backend": "executorch"}, "409 slots belong to an adapter for executorch, and only to one"),
        ({"dtype": "int4"}, "422 Invalid enum value 'int4'"),
        ({"rank_limit": 0}, "422 Expected `float` >= 1"),
        ({"rank_limit": 1.5}, "422 Expected `float` that's a multiple of 1"),
        ({"rank_limit": 1 << 70}, "422 Expected `float` <= 65536"),
        ({"rank_limit": "2"}, "422 Expected `float | null`, got `str`"),
        ({"prototypes": -1}, "422 Expected `float` >= 0"),
        ({"prototypes": 1025}, "422 Expected `float` <= 1024"),
        ({"prototypes": 1.5}, "422 Expected `float` that's a multiple of 1"),
        ({"prototypes": None}, "422 Expected `float`, got `null`"),
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
    monkeypatch.setattr(asgi, "BODY_SECONDS", 0.05)

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


def customizations(pool: Pool, cache: Path, **options: Any) -> Customizations:
    document = (pool.path / "pool.json").read_bytes()
    return Customizations(pool, document, None, cache, **{"cache_bytes": 1 << 20} | options)


def make(made: Customizations, *alpha: float) -> Path:
    return made.make(made.order(list(alpha)))


def test_old_archives_are_removed_above_the_limit(pool: Pool, cache: Path) -> None:
    made = customizations(pool, cache, cache_bytes=1)
    old = make(made, 1, 0, 0)
    recent = make(made, 0, 1, 0)
    assert old.exists()  # somebody may be fetching it
    os.utime(old, (1, 1))
    make(made, 0, 0, 1)
    assert not old.exists()
    assert recent.exists()


def test_what_is_there_does_not_wait_for_what_is_being_made(pool: Pool, cache: Path) -> None:
    made = customizations(pool, cache)
    path = make(made, *ALPHA)
    with made._building:
        assert asyncio.run(made.made(made.order(ALPHA))) == path


def test_whoever_stops_waiting_does_not_stop_the_others(ask: Ask, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MADE_SECONDS", 0.1)
    build = Customizations._build

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        build(*args)

    monkeypatch.setattr(Customizations, "_build", slow)
    refused = ask.customize()
    assert problem(refused) == "503 too many adapters are being made"
    assert refused.headers["retry-after"] == "5"
    assert len(list(cache.glob("*.crayon"))) == 1
    assert ask.customize().status_code == 200


def test_one_build_for_all_who_ask_for_the_same(pool: Pool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = customizations(pool, cache)
    built = []
    monkeypatch.setattr(made, "_build", lambda order, path: (built.append(order), time.sleep(0.05), path.touch()))
    monkeypatch.setattr("crayon_server.service.customizations.LONGEST_QUEUE", 2)

    async def many() -> list[Any]:
        orders = [made.order([n / 10, 0, 0]) for n in (1, 1, 1, 2, 2, 3)]
        return await asyncio.gather(*(made.made(order) for order in orders), return_exceptions=True)

    results = asyncio.run(many())
    assert [order.name for order in built] == [made.order([0.1, 0, 0]).name, made.order([0.2, 0, 0]).name]
    assert [isinstance(result, Path) for result in results] == [True] * 5 + [False]
    assert isinstance(results[5], QueueFull)


def test_a_full_disk_leaves_nothing_and_the_service_goes_on(pool: Pool) -> None:
    with needs.tmpfs(64 << 10) as disk:
        (disk / "cache").mkdir()
        ask = Ask(service.create_app(pool.path, None, cache=disk / "cache"), pool)
        filler = disk / "filler"
        filler.write_bytes(bytes(60 << 10))
        response = ask.customize()
        assert problem(response) == "503 the adapter could not be made"
        assert str(disk) not in response.text
        assert list((disk / "cache").iterdir()) == []
        filler.unlink()
        assert ask.customize().status_code == 200


def test_on_a_full_disk_old_archives_make_room(pool: Pool) -> None:
    with needs.tmpfs(64 << 10) as disk:
        made = customizations(pool, disk)
        old = make(made, *ALPHA)
        with old.open("ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 4096))
        with pytest.raises(OutputError, match="full"):  # somebody may be fetching it
            make(made, 1, 0, 0)
        os.utime(old, (1, 1))
        assert make(made, 1, 0, 0).exists()
        assert not old.exists()


def test_what_a_killed_process_left_is_removed_at_the_next_start(pool: Pool, cache: Path) -> None:
    program = """
        import os, sys, time
        from pathlib import Path
        from crayon_runtime.files import atomic_file
        with atomic_file(Path(sys.argv[1])) as file:
            print("writing", flush=True)
            time.sleep(60)
    """
    args = [sys.executable, "-c", textwrap.dedent(program), str(cache / f"{'0' * 32}.crayon")]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        customizations(pool, cache)
        assert len(list(cache.iterdir())) == 1, "its writer lives"
        process.kill()
    customizations(pool, cache)
    assert list(cache.iterdir()) == []


# The form of the adapter


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_the_adapter_comes_in_the_dtype_that_is_asked_for(ask: Ask, tmp_path: Path, dtype: str) -> None:
    (tmp_path / "got.crayon").write_bytes(ask.customize(dtype=dtype, backend="onnx").content)
    manifest = install(tmp_path / "got.crayon", tmp_path / "got").as_adapter
    assert manifest.variants.onnx.dtype == dtype


def test_float16_is_the_default(ask: Ask, cache: Path) -> None:
    assert ask.customize().content == ask.customize(dtype="fp16", rank_limit=None).content
    assert len(list(cache.iterdir())) == 1
    assert ask.customize(dtype="fp32").content != ask.customize().content


def test_a_rank_limit_truncates_what_is_above_it(ask: Ask, pool: Pool, cache: Path, tmp_path: Path) -> None:
    whole = ask.customize(dtype="fp32")
    assert ask.customize(dtype="fp32", rank_limit=2).content == whole.content
    assert ask.customize(dtype="fp32", rank_limit=50.0).content == whole.content
    assert len(list(cache.iterdir())) == 1
    (tmp_path / "got.crayon").write_bytes(ask.customize(dtype="fp32", rank_limit=1).content)
    bundle = install(tmp_path / "got.crayon", tmp_path / "got")
    assert {target.rank for target in bundle.as_adapter.targets} == {1}


# Clients


def test_an_address_that_asks_too_often(pool: Pool, cache: Path) -> None:
    ask = Ask(service.create_app(pool.path, None, cache=cache, rate_limit="3/minute"), pool)
    assert [ask("GET", "/v1/pool").status_code for _ in range(2)] == [200, 200]
    assert ask.customize().status_code == 200
    refused = ask.customize()
    assert problem(refused) == "429 you ask too often"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # Nobody is believed who he says he is.
    assert ask("GET", "/v1/pool", headers={"X-Forwarded-For": "198.51.100.7"}).status_code == 429
    assert ask("GET", "/healthz").status_code == 200
    assert ask("GET", "/metrics").status_code == 200


def test_addresses_are_counted_apart_and_ipv6_by_network() -> None:
    limit = RateLimit("1/hour")
    assert limit.wait("198.51.100.7") == 0
    assert 0 < limit.wait("198.51.100.7") <= 3601
    assert limit.wait("198.51.100.8") == 0
    assert limit.wait("2001:db8:1:2::1") == 0
    assert limit.wait("2001:db8:1:2:ffff::1") > 0
    assert limit.wait("2001:db8:1:3::1") == 0
    assert limit.wait(None) == 0
    assert limit.wait("testclient") > 0


@pytest.mark.parametrize("rate", ["", "often", "60", "60/fortnight", "-1/minute"])
def test_rates_that_are_none(rate: str) -> None:
    with pytest.raises(InvalidInput, match="is no rate"):
        RateLimit(rate)


def test_an_answer_that_is_read_too_slowly_is_cut_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(access_log, "SLOWEST_READER", 10_000)
    got = 0

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(1000), "more_body": True})

    async def slow(message: Any) -> None:
        nonlocal got
        await asyncio.sleep(0.15 if got == 5000 else 0)
        got += len(message.get("body", b""))
        if got == 9000:
            await asyncio.sleep(60)

    with caplog.at_level(logging.INFO, logger="crayon.service"):
        start = time.monotonic()
        asyncio.run(access_log.AccessLog(endless, Metrics())({"type": "http", "method": "GET"}, None, slow))  # type: ignore[arg-type]
    assert time.monotonic() - start < 20
    assert got == 9000
    assert json.loads(caplog.messages[0])["status"] == 499


def test_an_answer_that_is_made_slowly_is_not_cut_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "STALL_SECONDS", 0.2)

    async def thoughtful(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await asyncio.sleep(0.15)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def network(message: Any) -> None:
        await asyncio.sleep(0.001)

    with caplog.at_level(logging.INFO, logger="crayon.service"):
        asyncio.run(access_log.AccessLog(thoughtful, Metrics())({"type": "http", "method": "GET"}, None, network))  # type: ignore[arg-type]
    assert json.loads(caplog.messages[0])["status"] == 200


def test_the_metrics(ask: Ask) -> None:
    sent = len(ask.customize().content) + len(ask.customize().content)
    ask("GET", "/secret")
    ask("GET", "/v1/customizations/secret")
    response = ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    assert 'crayon_requests_total{route="/v1/customizations",status="200"} 2.0' in lines
    assert 'crayon_requests_total{route="/v1/customizations/{name}",status="404"} 1.0' in lines
    assert 'crayon_requests_total{route="-",status="404"} 1.0' in lines
    assert 'crayon_request_seconds_count{route="/v1/customizations"} 2.0' in lines
    assert "crayon_cache_hits_total 1.0" in lines
    assert "crayon_blend_seconds_count 1.0" in lines
    (total,) = (float(line.split()[1]) for line in lines if line.startswith("crayon_sent_bytes_total"))
    assert sent <= total <= sent + 500
    assert "secret" not in response.text


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
    assert read_key(path) == "correct horse battery"
    for content in (b"short", b"two lines of\nletters and more", "schlüsselschlüssel".encode()):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="API key"):
            read_key(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_key(tmp_path / "absent")


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
        "/metrics",
        "/v1/pool",
        "/v1/pool/signature",
        "/v1/pool/projection",
        "/v1/customizations",
        "/v1/customizations/{name}",
    }
    body = document["paths"]["/v1/customizations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["base_fingerprint", "pool_version", "alpha"]
    assert body["additionalProperties"] is False
    assert body["properties"]["dtype"]["enum"] == ["fp16", "fp32", "int8"]
    prototypes = body["properties"]["prototypes"]
    assert (prototypes["minimum"], prototypes["maximum"], prototypes["default"]) == (0, 1024, 64)
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


PROGRAM = "import sys; from crayon_server.cli.serve import serve; serve(sys.argv[1:])"


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service as a process, and its address."""
    (folder / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary")}
    command = [sys.executable, "-c", PROGRAM, *args, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = ""
        while process.poll() is None and "http://" not in line:
            line = process.stderr.readline()
        yield process, line.strip().rpartition("http://")[2]
    finally:
        process.kill()
        process.communicate()


def fetch(address: str, method: str = "GET", path: str = "/healthz", body: str | None = None) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    client = http.client.HTTPConnection(address, timeout=60)
    try:
        client.request(method, path, body)
        response = client.getresponse()
        return response.status, response.read()
    finally:
        client.close()


def children(process: subprocess.Popen[str]) -> set[int]:
    """The workers of a service; one more process keeps count of what they share."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        return fetch(address)[0] == 200
    except OSError:
        return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers(pool: Pool, keys: KeyStore, tmp_path: Path, ask: Ask) -> None:
    body = json.dumps(ask.body())
    right = ask.customize().content
    with serving(tmp_path, str(pool.path), "--keys", str(keys.path), "--workers", "2") as (process, address):
        assert [fetch(address, "POST", "/v1/customizations", body) for _ in range(12)] == [(200, right)] * 12
        # of all workers; a request is counted when its answer is out
        counted = b'crayon_requests_total{route="/v1/customizations",status="200"} 12.0'
        until(lambda: counted in fetch(address, path="/metrics")[1])
        workers = children(process)
        assert len(workers) == 2
        killed = workers.pop()
        os.kill(killed, signal.SIGKILL)
        # killed in the moment in which it was asked for a sign of life, it is given a minute to answer
        until(lambda: len(children(process) - {killed}) == 2, seconds=150)
        until(lambda: answers(address))
        assert fetch(address, "POST", "/v1/customizations", body) == (200, right)
        workers = children(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        until(lambda: not any(map(alive, workers)))
        assert list((tmp_path / "temporary").iterdir()) == []


def test_workers_end_with_who_started_them(pool: Pool, tmp_path: Path) -> None:
    with serving(tmp_path, str(pool.path), "--workers", "2") as (process, address):
        until(lambda: answers(address))
        workers = children(process)
        process.kill()
        until(lambda: not any(map(alive, workers)))


def test_a_client_that_sends_nothing_does_not_stay(pool: Pool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crayon_server.service.connection.FIRST_REQUEST_SECONDS", 0.2)
    with _listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(_config(service.create_app(pool.path, None, cache=cache), None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with socket.create_connection(listening.getsockname(), timeout=30) as silent:
                assert silent.recv(1) == b""
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize(
    "args, message",
    [(["--rate-limit", "often"], "is no rate"), (["--workers", "2", "--keys", "absent"], "keys cannot be read")],
)
def test_what_is_wrong_is_said_before_anything_starts(
    pool: Pool, tmp_path: Path, args: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "crayon_runtime", "serve", str(pool.path), "--port", "0", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_serve_answers_over_a_socket(
    pool: Pool, keys: KeyStore, tmp_path: Path, ask: Ask, stop: signal.Signals
) -> None:
    args = [sys.executable, "-c", PROGRAM, str(pool.path), "--port", "0", "--keys", str(keys.path)]
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
