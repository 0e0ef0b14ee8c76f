"""The client of a customization service, against one that misbehaves in every way that we could think of, and against the real one."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime import download
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.customize import customize as command
from crayon_runtime.customize import customize
from crayon_runtime.customized import Settings, check_serial, current, made_from, pinned_keys, read_state
from crayon_runtime.engine import Engine
from crayon_runtime.errors import (
    AdapterError,
    BundleError,
    ContextOverflow,
    CrayonError,
    IntegrityError,
    InvalidInput,
    ManifestError,
    PoolChanged,
    ServerError,
    SignatureError,
)
from crayon_runtime.examples import Example
from crayon_runtime.pool import Pool
from crayon_runtime.prototypes import Prototypes, read_prototypes
from crayon_runtime.remote import PoolClient
from crayon_runtime.signing import KeyStore
from tests.runtime import bundles, pools, tiny
from tests.runtime.services import (
    AGAIN,
    POOL,
    POST,
    PROJECTION,
    SIGNATURE,
    Handler,
    Service,
    answers,
    cut_at,
    hangs_up,
    real,
    refuses,
)

EXAMPLES = [Example("the alarm", " a b"), Example("the alarm stop", "é日本!"), Example("the", " the")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(download, "BACK_OFF", 0.01)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return pools.write(tmp_path / "pool", serial=100)


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore.create(tmp_path / "keys")


@pytest.fixture
def service(pool: Pool, keys: KeyStore, tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "service").mkdir()
    with Service(pool, keys, tmp_path / "service") as running:
        yield running


@pytest.fixture
def connect(service: Service, keys: KeyStore, tmp_path: Path) -> Iterator[Callable[..., PoolClient]]:
    made: list[PoolClient] = []

    def make(**changes: Any) -> PoolClient:
        options = {"trusted": keys.trusted, "cache": tmp_path / "cache", "timeout": 5.0, "deadline": 20.0} | changes
        made.append(PoolClient(options.pop("url", service.url), **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Callable[..., PoolClient]) -> PoolClient:
    return connect()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny.bundle(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(model: Bundle) -> Iterator[Engine]:
    """Any adapter that is not called worse makes what is in the examples likelier."""
    wanted = {i for example in EXAMPLES for i in tiny.TOKENIZER.encode(example.completion)}

    def script(tokens: list[int], adapter: str | None) -> np.ndarray:
        logits = np.zeros(tiny.VOCAB_SIZE, np.float32)
        logits[list(wanted)] = 0.0 if adapter is None else -1.0 if "worse" in adapter else 1.0
        return logits

    with tiny.engine(script, bundle=model, tap_size=8) as made:
        yield made


def body(pool: Pool, **changes: Any) -> dict[str, Any]:
    manifest = pool.manifest
    fields = {"base_fingerprint": manifest.base_fingerprint, "pool_version": manifest.version, "alpha": [0.7, 0.2, 0.1]}
    return fields | changes


@pytest.fixture
def fetch(client: PoolClient, pool: Pool, tmp_path: Path) -> Callable[[], Bundle]:
    """Ask for an adapter; if that fails, nothing of it may be left."""
    (tmp_path / "got").mkdir()

    def get() -> Bundle:
        try:
            return client.adapter(body(pool), tmp_path / "got/adapter")
        except CrayonError:
            assert list((tmp_path / "got").iterdir()) == []
            raise

    return get


# What goes over the wire


def test_alpha_and_nothing_else_is_sent(service: Service, engine: Engine, client: PoolClient, tmp_path: Path) -> None:
    result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert result.installed, result.reason
    assert engine.adapter == "adapter-0"
    assert [(asked.method, asked.path) for asked in service.asked] == [
        ("GET", POOL),
        ("GET", SIGNATURE),
        ("GET", PROJECTION),
        ("POST", POST),
    ]
    assert json.loads(service.asked[-1].body) == result.sent
    assert set(result.sent) == {"base_fingerprint", "pool_version", "alpha"}
    assert result.sent["alpha"] == [round(a, 4) for a in result.alpha]
    assert sum(result.sent["alpha"]) == pytest.approx(1, abs=1e-3)
    assert result.sent_bytes == len(service.asked[-1].body)
    assert result.received_bytes == sum(
        map(len, (service.document, service.signature or b"", service.projection, service.last))
    )
    everything = b"".join(repr(asked).encode() for asked in service.asked)
    for example in EXAMPLES:
        assert example.completion.strip().encode() not in everything.replace(b"alpha", b"")
    allowed = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type"}
    assert {name for asked in service.asked for name in asked.headers} <= allowed
    assert list(result.seconds) == ["pool", "embed", "alpha", "request", "download", "verify", "prove", "swap"]


@pytest.mark.parametrize("adapters", [16, 64])
def test_the_body_is_small(
    adapters: int, engine: Engine, service: Service, connect: Callable[..., PoolClient], tmp_path: Path
) -> None:
    service.serve(pools.write(tmp_path / "many", adapters=pools.loras(adapters)))
    result = customize(engine, EXAMPLES, connect(), folder=tmp_path / "customized")
    assert len(result.alpha) == adapters
    assert result.sent_bytes <= 1024


def test_what_is_asked_for_beyond_the_default(
    engine: Engine, service: Service, client: PoolClient, tmp_path: Path
) -> None:
    customize(engine, EXAMPLES, client, folder=tmp_path / "customized", dtype="int8", rank_limit=1, digits=2)
    sent = json.loads(service.asked[-1].body)
    assert (sent["dtype"], sent["rank_limit"]) == ("int8", 1)
    assert sent["alpha"] == [round(a, 2) for a in sent["alpha"]]


# Prototypes


def with_prototypes(out: Path, count: int = 90, **changes: Any) -> Pool:
    return pools.write(out, serial=100, server=pools.prototypes((0,) * count + (1,) * count + (2,) * count), **changes)


def test_prototypes_come_with_the_adapter(engine: Engine, service: Service, client: PoolClient, tmp_path: Path) -> None:
    service.serve(pool := with_prototypes(tmp_path / "other"))
    result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert "prototypes" not in json.loads(service.asked[-1].body), "as many as services send of themselves"
    found = read_prototypes(Bundle.open(tmp_path / "customized/adapter"), 8)
    expected = pool.prototypes.picked(result.alpha, 64) if pool.prototypes else None
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.states, expected.states)
    assert result.prototypes_bytes == (tmp_path / "customized/adapter/prototypes.safetensors").stat().st_size
    customize(engine, EXAMPLES, client, folder=tmp_path / "customized", prototypes=3)
    assert json.loads(service.asked[-1].body)["prototypes"] == 3
    assert Bundle.open(tmp_path / "customized/adapter").as_adapter.prototypes.count == 3  # type: ignore[union-attr]


def edit_prototypes(service: Service, **changes: Any) -> None:
    """Let the service send others than it should, with the right hashes and signatures."""
    made = pools.prototypes((0,) * 64, changes.pop("d", 8))
    states = made.states.astype(np.float32)
    options = {"base": bundles.BASE, "version": service.pool.manifest.version} | changes

    def edit(adapter: Path) -> None:
        content = Prototypes(states, made.mean, "m").to_bytes(options["base"], options["version"])
        if options.get("nan"):
            content = content.replace(states.astype(np.float16).tobytes()[:2], b"\xff\xff", 1)
        (adapter / "prototypes.safetensors").write_bytes(content)
        entry = {"path": "prototypes.safetensors", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        def relist(document: dict[str, Any]) -> None:
            document["files"] = [file for file in document["files"] if file["path"] != entry["path"]] + [entry]
            count = options.get("count", len(states))
            document["prototypes"] = {"file": entry["path"], "count": count, "model": "m"}

        bundles.edit_manifest(adapter, relist)

    service.edit = edit


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"base": "c" * 64}, AdapterError, "the prototypes are of another base"),
        ({"version": "f" * 16}, AdapterError, "the prototypes are of another version of the pool"),
        ({"d": 7}, AdapterError, r"expected .*\(64, 8\)"),
        ({"nan": True}, IntegrityError, "the prototypes hold NaN or infinity"),
        ({"count": 63}, AdapterError, "expected|take less room"),
        ({"count": 65}, AdapterError, "the service sent 65 prototypes; 64 could be asked for"),
    ],
)
def test_prototypes_that_are_not_what_they_should_be(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    engine: Engine,
    service: Service,
    client: PoolClient,
    tmp_path: Path,
) -> None:
    service.serve(with_prototypes(tmp_path / "other"))
    edit_prototypes(service, **changes)
    with pytest.raises(error, match=message):
        customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert not (tmp_path / "customized").exists()
    assert engine.adapter is None


def test_prototypes_that_the_pool_does_not_have(service: Service, fetch: Callable[[], Bundle]) -> None:
    edit_prototypes(service)
    with pytest.raises(AdapterError, match="the service sent 64 prototypes; 0 could be asked for"):
        fetch()


def test_prototypes_larger_than_an_adapter(
    engine: Engine, service: Service, client: PoolClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crayon_runtime.remote._SLACK", 4096)
    service.serve(with_prototypes(tmp_path / "other", count=1024))
    result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized", prototypes=1024)
    assert result.installed
    assert result.prototypes_bytes > 1024 * 8 * 2


@pytest.mark.parametrize("options", [{"refine": True}, {"blend": "concat"}, {"rank": 2}])
def test_what_only_a_pool_on_the_device_can_do(
    options: dict[str, Any], engine: Engine, client: PoolClient, service: Service
) -> None:
    with pytest.raises(InvalidInput, match="is not for a service"):
        customize(engine, EXAMPLES, client, **options)
    assert not service.asked


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"rank_limit": 2}])
def test_what_only_a_service_is_asked_for(options: dict[str, Any], engine: Engine, pool: Pool) -> None:
    with pytest.raises(InvalidInput, match="is not for a pool on this device"):
        customize(engine, EXAMPLES, pool, **options)


def test_the_key_is_sent(service: Service, connect: Callable[..., PoolClient]) -> None:
    assert connect(api_key="0123456789abcdef").manifest
    assert {asked.headers["authorization"] for asked in service.asked} == {"Bearer 0123456789abcdef"}


def test_the_next_visit_moves_a_few_bytes(service: Service, connect: Callable[..., PoolClient]) -> None:
    first = connect()
    assert first.projection
    again = connect()
    assert again.manifest == first.manifest
    np.testing.assert_array_equal(again.projection.indicators, first.projection.indicators)
    assert (again.sent_bytes, again.received_bytes) == (0, 0)
    assert [asked.path for asked in service.asked] == [POOL, SIGNATURE, PROJECTION, POOL]


def test_a_damaged_cache_is_not_believed(service: Service, connect: Callable[..., PoolClient], tmp_path: Path) -> None:
    assert connect().projection
    for path in (tmp_path / "cache").iterdir():
        bundles.flip_byte(path, path.stat().st_size // 2)
    client = connect()
    assert client.manifest == Pool.open(service.pool.path).manifest
    assert client.projection
    assert service.count(PROJECTION) == 2


def test_the_cache_of_one_service_is_not_that_of_another(
    service: Service, connect: Callable[..., PoolClient], keys: KeyStore, tmp_path: Path
) -> None:
    assert connect().projection
    (tmp_path / "other").mkdir()
    pool = pools.write(tmp_path / "other-pool", adapters=pools.loras(4))
    with Service(pool, keys, tmp_path / "other") as other:
        other.always[POOL] = answers(304)
        with pytest.raises(ServerError, match="no customization service here"):
            assert connect(url=other.url).manifest
        del other.always[POOL]
        assert connect(url=other.url).projection
    assert len(list((tmp_path / "cache").glob("projection-*"))) == 1


# Connections that are cut


@pytest.mark.parametrize("at", [0, 1, 100, 1500])
def test_a_cut_download_goes_on_where_it_ended(at: int, service: Service, fetch: Callable[[], Bundle]) -> None:
    service.faults[POST] = [cut_at(at)]
    assert fetch().as_adapter.name == "adapter-0"
    if at:
        assert [asked.path for asked in service.asked[-2:]] == [POST, AGAIN]
        assert service.asked[-1].headers["range"] == f"bytes={at}-"
        assert service.asked[-1].headers["if-range"] == service.tag
    else:
        assert service.count(POST) == 2


def test_it_may_be_cut_often_while_it_gets_further(service: Service, fetch: Callable[[], Bundle]) -> None:
    def a_little(to: Handler) -> None:
        start = int(to.headers["range"].removeprefix("bytes=").removesuffix("-"))
        rest = service.last[start:]
        to.head(206, Content_Length=len(rest), ETag=service.tag, Content_Range=f"bytes {start}-9/9")
        to.wfile.write(rest[:100])
        to.cut()

    service.faults[POST] = [cut_at(100)]
    service.faults[AGAIN] = [a_little] * (2 * download.RETRIES)
    assert fetch()
    assert service.count(AGAIN) == 2 * download.RETRIES + 1


def test_a_server_without_ranges_sends_everything_again(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.ranges = False
    service.faults[POST] = [cut_at(500)]
    assert fetch()


@pytest.mark.parametrize("status", [404, 410, 416, 412])
def test_what_is_gone_is_asked_for_anew(status: int, service: Service, fetch: Callable[[], Bundle]) -> None:
    service.faults[POST] = [cut_at(500)]
    service.faults[AGAIN] = [answers(status)]
    assert fetch()
    assert service.count(POST) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": "bytes 0-9/10"},
        {"Content_Range": "bytes 501-900/901"},
        {"Content_Range": "nonsense"},
        {"Content_Range": "bytes 500-900/901", "ETag": '"other"'},
        {},
    ],
)
def test_another_part_than_asked_for_is_not_used(
    headers: dict[str, str], service: Service, fetch: Callable[[], Bundle]
) -> None:
    service.faults[POST] = [cut_at(500)]
    service.faults[AGAIN] = [lambda to: to.reply(206, b"x" * 400, **headers)]
    assert fetch()
    assert service.count(POST) == 2


@pytest.mark.parametrize("changes", [{"ETag": 'W/"weak"'}, {"ETag": ""}, {"Content_Location": "https://elsewhere/x"}])
def test_without_an_etag_or_an_address_it_starts_from_zero(
    changes: dict[str, str], service: Service, fetch: Callable[[], Bundle]
) -> None:
    service.faults[POST] = [cut_at(500, **changes)]
    assert fetch()
    assert (service.count(POST), service.count(AGAIN)) == (2, 0)


def test_a_server_that_dies_for_good(service: Service, fetch: Callable[[], Bundle], client: PoolClient) -> None:
    assert client.manifest
    service.always[POST] = cut_at(500)
    service.always[AGAIN] = hangs_up
    with pytest.raises(ServerError, match="the connection failed"):
        fetch()
    assert service.count(AGAIN) == 1 + download.RETRIES


def test_the_projection_is_resumed_too(service: Service, client: PoolClient) -> None:
    def fault(to: Handler) -> None:
        to.head(200, Content_Length=len(service.projection), ETag='"projection"')
        to.wfile.write(service.projection[:100])
        to.cut()

    service.faults[PROJECTION] = [fault]
    assert client.projection
    assert service.asked[-1].headers["range"] == "bytes=100-"


def test_nobody_is_there(connect: Callable[..., PoolClient]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ServerError, match="the connection failed: .*refused"):
        assert connect(url=f"http://127.0.0.1:{port}").manifest
    assert time.monotonic() - started < 1, "it is not tried again"


# Lies, and slowness


def test_a_length_that_is_too_long(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = lambda to: cut_at(len(service.last), Content_Length=len(service.last) + 10)(to)
    service.always[AGAIN] = answers(416)
    with pytest.raises(ServerError, match="does not have the rest"):
        fetch()
    assert service.count(POST) <= 1 + download.RETRIES


def test_a_length_that_is_too_short(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = lambda to: to.reply(200, service.last[:-10], ETag=service.tag)
    with pytest.raises(BundleError, match="not a readable .crayon archive"):
        fetch()


def test_a_length_that_nothing_explains(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = lambda to: to.head(200, Content_Length=1 << 40)
    with pytest.raises(IntegrityError, match="1099511627776 bytes; .* are the most"):
        fetch()
    assert service.count(POST) == 1


def test_a_body_that_does_not_end(service: Service, fetch: Callable[[], Bundle], client: PoolClient) -> None:
    def endless(to: Handler) -> None:
        to.head(200, Transfer_Encoding="chunked")
        try:
            while True:
                to.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        except OSError:
            to.close_connection = True

    service.always[POST] = endless
    with pytest.raises(IntegrityError, match="sends more bytes"):
        fetch()
    assert client.received_bytes < 10e6


@pytest.mark.parametrize("path", [POOL, SIGNATURE, PROJECTION])
def test_the_pool_is_bounded_too(path: str, service: Service, client: PoolClient) -> None:
    service.always[path] = lambda to: to.head(200, Content_Length=1 << 30)
    with pytest.raises(IntegrityError, match="are the most"):
        assert client.projection


def test_what_is_compressed_is_refused(service: Service, client: PoolClient) -> None:
    service.always[POOL] = answers(200, b"x" * 100, Content_Encoding="gzip")
    with pytest.raises(ServerError, match="compressed"):
        assert client.manifest


def test_a_server_that_does_not_answer(service: Service, connect: Callable[..., PoolClient]) -> None:
    free = threading.Event()
    service.always[POOL] = lambda to: free.wait(10)
    try:
        with pytest.raises(ServerError, match=r"did not answer for 0\.2 s"):
            assert connect(timeout=0.2).manifest
    finally:
        free.set()


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips(part: str, service: Service, connect: Callable[..., PoolClient]) -> None:
    def drip(to: Handler) -> None:
        if part == "headers":
            to.wfile.write(b"HTTP/1.1 200 OK\r\n")
        else:
            to.head(200, Content_Length=100_000)
        try:
            for _ in range(200):
                to.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        to.close_connection = True

    service.always[POOL] = drip
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"did not get to the end within 0\.5 s"):
        assert connect(timeout=5, deadline=0.5).manifest
    assert time.monotonic() - started < 4


def test_redirects_are_not_followed(service: Service, client: PoolClient, keys: KeyStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with Service(service.pool, keys, tmp_path / "other") as other:
        service.always[POOL] = answers(302, Location=f"{other.url}/v1/pool")
        with pytest.raises(ServerError, match=f"redirects to {other.url}"):
            assert client.manifest
        assert not other.asked


PAGE = b"<html><title>Please log in</title></html>"


@pytest.mark.parametrize("path, error", [(POOL, SignatureError), (SIGNATURE, SignatureError), (POST, BundleError)])
def test_a_page_in_the_place_of_a_file(
    path: str, error: type[CrayonError], service: Service, fetch: Callable[[], Bundle]
) -> None:
    service.always[path] = answers(200, PAGE, Content_Type="text/html")
    with pytest.raises(error):
        fetch()


def test_a_page_in_the_place_of_an_unsigned_pool(service: Service, connect: Callable[..., PoolClient]) -> None:
    service.always[POOL] = answers(200, PAGE)
    with pytest.raises(ManifestError):
        assert connect(trusted=None).manifest


# Refusals


@pytest.mark.parametrize(
    "status, error, message",
    [
        (400, ServerError, r"the service refuses: because \(400\)"),
        (401, ServerError, "the service refuses"),
        (403, ServerError, "the service refuses"),
        (404, ServerError, "there is no such service here"),
        (409, PoolChanged, "the service refuses"),
        (413, ServerError, "the service refuses"),
        (422, ServerError, "the service refuses"),
        (500, ServerError, "cannot answer now"),
        (503, ServerError, "cannot answer now"),
    ],
)
def test_refusals(
    status: int, error: type[CrayonError], message: str, service: Service, fetch: Callable[[], Bundle]
) -> None:
    service.always[POST] = refuses(status, "because", "do this")
    with pytest.raises(error, match=message) as caught:
        fetch()
    assert caught.value.do
    assert service.count(POST) == (1 + download.RETRIES if status >= 500 else 1)


def test_what_passes_is_waited_for(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.faults[POST] = [refuses(503), answers(502, PAGE), refuses(429, Retry_After=0)]
    assert fetch()
    assert service.count(POST) == 4


def test_the_server_says_how_long_to_wait(
    service: Service, fetch: Callable[[], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    in_four = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 5))
    service.faults[POST] = [refuses(429, Retry_After=3), refuses(503, Retry_After=in_four)]
    assert fetch()
    assert slept[0] == 3
    assert 2 < slept[1] <= 5


def test_a_wait_that_is_too_long(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = refuses(429, Retry_After=3600)
    with pytest.raises(ServerError, match="cannot answer now") as caught:
        fetch()
    assert caught.value.do == "try again in 3600 s"


def test_what_a_server_says_does_not_steer_the_terminal(service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = refuses(422, "red \x1b[31m\r\n" + "x" * 1000, "\x1b]0;title\x07")
    with pytest.raises(ServerError) as caught:
        fetch()
    assert caught.value.what.startswith("the service refuses: red [31mxxx")
    assert len(caught.value.what) < 400
    assert caught.value.do == "]0;title"


# Pools that are not what they should be


def test_a_pool_that_nobody_signed(
    connect: Callable[..., PoolClient], service: Service, keys: KeyStore, tmp_path: Path
) -> None:
    service.keys = None
    with pytest.raises(SignatureError, match="does not sign its pool"):
        assert connect().manifest
    assert connect(trusted=None).manifest


def test_a_pool_that_was_changed_on_the_way(service: Service, client: PoolClient) -> None:
    signature = service.signature
    service.document = service.document.replace(b"separate", b"concat")
    service.always[SIGNATURE] = lambda to: to.reply(200, signature or b"")
    with pytest.raises(SignatureError, match="is not what"):
        assert client.manifest


def test_a_pool_of_another_key(service: Service, client: PoolClient, tmp_path: Path) -> None:
    service.keys = KeyStore.create(tmp_path / "others")
    with pytest.raises(SignatureError, match="not a key that is trusted here"):
        assert client.manifest


def test_a_revoked_key(service: Service, connect: Callable[..., PoolClient], keys: KeyStore) -> None:
    assert connect().manifest
    old = service.keys.current  # type: ignore[union-attr]
    assert old is not None
    signature = service.signature
    keys.rotate()
    keys.revoke(old.id)
    service.keys = keys
    service.always[SIGNATURE] = lambda to: to.reply(200, signature or b"")
    with pytest.raises(SignatureError, match="was revoked"):
        assert connect(trusted=keys.trusted).manifest
    del service.always[SIGNATURE]  # the same pool.json, signed again
    assert connect(trusted=keys.trusted).manifest
    assert service.asked[-2].headers["if-none-match"]


def test_a_pool_that_changes_between_two_requests(service: Service, client: PoolClient, tmp_path: Path) -> None:
    newer = pools.write(tmp_path / "newer", adapters=pools.loras(seed=1), serial=200)

    def change(to: Handler) -> None:
        service.serve(newer)
        service.behave(to)

    service.faults[SIGNATURE] = [change]
    assert client.manifest == newer.manifest


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda d: d.update(version="0" * 16), IntegrityError),
        (lambda d: d.update(kind="model"), ManifestError),
        (lambda d: d.update(schema_version="2.0"), CrayonError),
        (lambda d: d["files"].pop(), ManifestError),
        (lambda d: d["files"][0].update(size=-1), ManifestError),
        (lambda d: d["files"][0].update(path="../../x"), CrayonError),
    ],
)
def test_a_pool_json_that_contradicts_itself(
    change: Callable[[dict[str, Any]], object],
    error: type[CrayonError],
    service: Service,
    connect: Callable[..., PoolClient],
) -> None:
    document = json.loads(service.document)
    change(document)
    service.document = json.dumps(document).encode()
    with pytest.raises(error):
        assert connect(trusted=None).manifest


@pytest.mark.parametrize("change", [lambda p: p[:-1] + b"\xff", lambda p: p[:-1], lambda p: PAGE])
def test_a_projection_of_another_build(
    change: Callable[[bytes], bytes], service: Service, client: PoolClient, tmp_path: Path
) -> None:
    service.projection = change(service.projection)
    with pytest.raises(IntegrityError, match="not the one that its pool.json describes"):
        assert client.projection
    assert not list((tmp_path / "cache").glob("projection-*"))


# Adapters that are not what they should be


def test_an_adapter_that_was_tampered_with(service: Service, fetch: Callable[[], Bundle]) -> None:
    def tamper(to: Handler) -> None:
        content = bytearray(service.last)
        content[content.index(b"TORT") + 600] ^= 1
        to.reply(200, bytes(content))

    service.always[POST] = tamper
    with pytest.raises(BundleError, match="damaged|cannot be read"):
        fetch()


@pytest.mark.parametrize("end", [0, 10, 500, -1])
def test_a_truncated_adapter(end: int, service: Service, fetch: Callable[[], Bundle]) -> None:
    service.always[POST] = lambda to: to.reply(200, service.last[:end])
    with pytest.raises(BundleError):
        fetch()


def test_an_unsigned_adapter(service: Service, fetch: Callable[[], Bundle], client: PoolClient) -> None:
    assert client.manifest
    service.keys = None
    with pytest.raises(SignatureError, match="the adapter is not signed"):
        fetch()


def test_an_adapter_of_a_revoked_key(
    service: Service, connect: Callable[..., PoolClient], pool: Pool, keys: KeyStore, tmp_path: Path
) -> None:
    old = keys.current
    assert old is not None
    archive = service.archive(msgspec.json.encode(body(pool)))
    keys.rotate()
    keys.revoke(old.id)
    service.always[POST] = answers(200, archive)
    with pytest.raises(SignatureError, match="was revoked"):
        connect(trusted=keys.trusted).adapter(body(pool), tmp_path / "got")
    assert not (tmp_path / "got").exists()


def manifest_edit(**changes: Any) -> Callable[[Path], object]:
    return lambda path: bundles.edit_manifest(path, lambda document: document.update(changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_fingerprint": "c" * 64}, "an adapter of another base model"),
        ({"pool": None}, "an adapter of no pool, not of pool random"),
        ({"pool": {"name": "random", "version": "0" * 16, "serial": 100}}, "an adapter of pool random 0000"),
        ({"pool": {"name": "random", "version": None, "serial": 99}}, "an adapter of pool random"),
    ],
)
def test_an_adapter_of_something_else(
    changes: dict[str, Any], message: str, service: Service, fetch: Callable[[], Bundle]
) -> None:
    if changes.get("pool"):
        changes["pool"]["version"] = changes["pool"]["version"] or service.pool.manifest.version
    service.edit = manifest_edit(**changes)
    with pytest.raises(AdapterError, match=message):
        fetch()


def test_a_model_in_the_place_of_an_adapter(service: Service, fetch: Callable[[], Bundle], tmp_path: Path) -> None:
    from crayon_runtime.bundle import pack
    from crayon_runtime.signing import sign

    model = Bundle.open(bundles.write_model(tmp_path / "model"))
    assert service.keys
    sign(model, service.keys.signing_key())
    service.always[POST] = answers(200, pack(model.path, tmp_path / "model.crayon").read_bytes())
    with pytest.raises(ManifestError, match="a model, not an adapter"):
        fetch()


def bomb(path: Path, service: Service, compression: int, times: int) -> bytes:
    """The archive with its tensors replaced by zeros, many times their size."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("manifest.json", json.dumps({"schema_version": "1.0"}))
        archive.writestr("adapter.onnx_adapter", bytes(times << 20))
    return path.read_bytes()


def test_a_zip_bomb(service: Service, connect: Callable[..., PoolClient], pool: Pool, tmp_path: Path) -> None:
    content = bomb(tmp_path / "bomb", service, zipfile.ZIP_DEFLATED, 200)
    assert len(content) < 1e6
    service.always[POST] = answers(200, content)
    with pytest.raises(BundleError):
        connect(trusted=None).adapter(body(pool), tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_entries_that_overlap(service: Service, connect: Callable[..., PoolClient], pool: Pool, tmp_path: Path) -> None:
    """Many files of a manifest whose entries are all the same bytes of the archive: small to send, large to unpack."""
    from crayon_runtime.bundle import pack

    service.keys = None
    client = connect(trusted=None)
    service.archive(msgspec.json.encode(body(pool)))
    made = tmp_path / "service/made-0"
    size = 3 << 20
    files = [{"path": f"{n:03d}", "size": size, "sha256": hashlib.sha256(bytes(size)).hexdigest()} for n in range(9)]
    for file in files:
        (made / file["path"]).write_bytes(bytes(size))  # type: ignore[operator]
    bundles.edit_manifest(made, lambda document: document["files"].extend(files))
    whole = pack(made, tmp_path / "whole.crayon").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.crayon") as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    cut = whole[: offsets["001"]] + whole[whole.index(b"PK\x01\x02") :]
    directory = cut.index(b"PK\x01\x02")
    content = bytearray(cut)
    at = directory
    while content[at : at + 4] == b"PK\x01\x02":
        name_size = int.from_bytes(content[at + 28 : at + 30], "little")
        name = content[at + 46 : at + 46 + name_size].decode()
        if name.isdigit():
            content[at + 42 : at + 46] = offsets["000"].to_bytes(4, "little")
        at += 46 + name_size
    content[-6:-2] = directory.to_bytes(4, "little")
    service.always[POST] = answers(200, bytes(content))
    with pytest.raises(BundleError):
        client.adapter(body(pool), tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_more_than_the_pool_explains(service: Service, fetch: Callable[[], Bundle], tmp_path: Path) -> None:
    def fatten(path: Path) -> None:
        (path / "ballast").write_bytes(bytes(6 << 20))
        from crayon_runtime.files import sha256_file

        entry = {"path": "ballast", "size": 6 << 20, "sha256": sha256_file(path / "ballast")}
        bundles.edit_manifest(path, lambda document: document["files"].append(entry))

    service.edit = fatten
    with pytest.raises(IntegrityError, match="are the most that this can be"):
        fetch()


# Addresses and keys


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "https://",
        "http://127.0.0.1:port",
        "http://user:secret@127.0.0.1",
        "http://127.0.0.1/?a=b",
        "http://127.0.0.1/#a",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\n",
        "http://[::1",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        PoolClient(url, trusted=None)
    assert "secret" not in str(caught.value)


def test_alpha_does_not_go_in_plain_text_to_other_machines() -> None:
    with pytest.raises(InvalidInput, match="fingerprint"):
        PoolClient("http://192.0.2.1", trusted=None)
    for url in ("https://192.0.2.1", "http://127.0.0.2:1", "http://[::1]:1", "http://localhost"):
        PoolClient(url, trusted=None).close()
    PoolClient("http://192.0.2.1", trusted=None, plain_http=True).close()


@pytest.mark.parametrize("key", ["", "é" * 16, "two\nlines", " "])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(InvalidInput, match="one line of ASCII"):
        PoolClient("http://127.0.0.1", trusted=None, api_key=key)


def test_a_service_below_a_path(service: Service, connect: Callable[..., PoolClient]) -> None:
    with pytest.raises(ServerError, match="no customization service here"):
        assert connect(url=f"{service.url}/deep/").manifest
    assert service.asked[-1].path == "/deep/v1/pool"


# Customizing


def customized(folder: Path) -> dict[str, bytes]:
    Bundle.open(folder / "adapter", verify=True)
    read_state(folder)
    return bundles.contents(folder)


def test_an_upgrade_between_pool_and_adapter(
    service: Service, engine: Engine, client: PoolClient, tmp_path: Path
) -> None:
    newer = pools.write(tmp_path / "newer", adapters=pools.loras(4, seed=1), serial=200)

    def upgrade(to: Handler) -> None:
        service.serve(newer)
        refuses(409, "another version")(to)

    service.faults[POST] = [upgrade]
    result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert result.installed
    assert len(result.alpha) == 4
    assert read_state(tmp_path / "customized").pool_version == newer.manifest.version


def test_a_service_that_never_agrees_with_itself(
    service: Service, engine: Engine, client: PoolClient, tmp_path: Path
) -> None:
    service.always[POST] = refuses(409, "another version", "get /v1/pool")
    with pytest.raises(PoolChanged, match="another version"):
        customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert service.count(POST) == 2
    assert not [path for path in tmp_path.iterdir() if "customized" in path.name]


def test_an_older_pool_is_refused_unless_allowed(
    service: Service, engine: Engine, connect: Callable[..., PoolClient], tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, EXAMPLES, connect(), folder=folder)
    before = customized(folder)
    older = pools.write(tmp_path / "older", adapters=pools.loras(seed=1), serial=99)
    service.serve(older)
    with pytest.raises(ServerError, match="serial 99; one with serial 100 was accepted before"):
        customize(engine, EXAMPLES, connect(), folder=folder)
    assert customized(folder) == before
    assert customize(engine, EXAMPLES, connect(), folder=folder, allow_older=True).installed
    assert read_state(folder).newest_serial == 100, "the newest that was ever accepted"
    with pytest.raises(ServerError, match="serial 99"):
        check_serial(older.manifest, folder)


def test_an_older_pool_in_the_middle(service: Service, engine: Engine, client: PoolClient, tmp_path: Path) -> None:
    folder = tmp_path / "customized"
    customize(engine, EXAMPLES, client, folder=folder)
    older = pools.write(tmp_path / "older", adapters=pools.loras(seed=1), serial=99)

    def downgrade(to: Handler) -> None:
        service.serve(older)
        refuses(409, "another version")(to)

    service.faults[POST] = [downgrade]
    with pytest.raises(ServerError, match="serial 99"):
        customize(engine, EXAMPLES, client, folder=folder)


def test_a_pool_on_the_device_leaves_keys_and_serial(
    engine: Engine, client: PoolClient, keys: KeyStore, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, EXAMPLES, client, folder=folder)
    local = pools.write(tmp_path / "local", adapters=pools.loras(seed=1), serial=5)
    assert customize(engine, EXAMPLES, local, folder=folder).installed
    assert pinned_keys(folder) == keys.trusted
    assert read_state(folder).newest_serial == 100


@pytest.mark.parametrize(
    "fault",
    [answers(200, PAGE), cut_at(300), refuses(422), answers(200, b""), hangs_up],
    ids=["page", "cut", "refusal", "empty", "hang up"],
)
def test_whatever_fails_the_old_adapter_stays(
    fault: Any, service: Service, engine: Engine, client: PoolClient, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, EXAMPLES, client, folder=folder)
    before = customized(folder)
    service.always[POST] = fault
    service.always[AGAIN] = hangs_up
    with pytest.raises(CrayonError):
        customize(engine, EXAMPLES[:2], client, folder=folder)
    assert customized(folder) == before
    assert engine.adapter == "adapter-0"
    assert [path.name for path in tmp_path.iterdir() if "customized" in path.name] == ["customized"]


def test_an_adapter_that_makes_it_worse(service: Service, engine: Engine, client: PoolClient, tmp_path: Path) -> None:
    folder = tmp_path / "customized"
    service.edit = manifest_edit(name="worse")
    result = customize(engine, EXAMPLES, client, folder=folder)
    assert (result.installed, result.adapter, engine.adapter) == (False, None, None)
    assert "the log-loss of the examples is" in result.reason
    assert not folder.exists()


@pytest.mark.parametrize(
    "examples, error",
    [
        ([], InvalidInput),
        ([("the", " ")], InvalidInput),
        ([*EXAMPLES, ("the", "a" * 2000)], ContextOverflow),
        ([("the", "\ud800")], InvalidInput),
    ],
)
def test_examples_that_cannot_be_used_send_nothing(
    examples: Any, error: type[CrayonError], service: Service, engine: Engine, client: PoolClient, tmp_path: Path
) -> None:
    with pytest.raises(error):
        customize(engine, examples, client, folder=tmp_path / "customized")
    assert service.count(POST) == 0


def test_examples_in_another_language(service: Service, engine: Engine, client: PoolClient, tmp_path: Path) -> None:
    foreign = [Example("закажи такси домой", "вызов такси"), Example("明日の天気は", "天気 明日")]
    result = customize(engine, foreign, client, folder=tmp_path / "customized")
    assert np.isfinite(result.alpha).all()
    assert result.installed or "log-loss" in result.reason


def test_a_pool_for_another_base_is_refused_before_its_projection(
    service: Service, engine: Engine, client: PoolClient, tmp_path: Path
) -> None:
    service.serve(pools.write(tmp_path / "other", base="c" * 64))
    with pytest.raises(AdapterError, match="built for another base model"):
        customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert service.count(PROJECTION) == 0


# Nothing changed


def test_current(
    service: Service, engine: Engine, connect: Callable[..., PoolClient], keys: KeyStore, tmp_path: Path
) -> None:
    folder, client = tmp_path / "customized", connect()

    def found(
        examples: list[Example] = EXAMPLES, by: PoolClient = client, base: str = bundles.BASE, **options: Any
    ) -> Any:
        of = made_from(base, examples, by.manifest, Settings(**options).checked(by))
        return current(folder, of, by.trusted)

    assert found() is None
    customize(engine, EXAMPLES, client, folder=folder)
    assert found() == read_state(folder)
    assert found(digits=4, seed=3), "the same in effect"
    assert found(EXAMPLES[:2]) is None
    assert found(digits=2) is None
    assert found(dtype="int8") is None
    assert found(prototypes=32) is None
    assert found(base="c" * 64) is None

    old = keys.current
    assert old
    keys.rotate()
    keys.revoke(old.id)
    service.keys = keys
    assert found(by=connect(trusted=keys.trusted)) is None, "its key was revoked"

    bundles.flip_byte(folder / "adapter/adapter.onnx_adapter")
    (folder / "adapter/.installed.json").unlink()
    assert found() is None, "it is damaged"


# The command


@pytest.fixture
def call(
    service: Service, engine: Engine, model: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    (tmp_path / "device").mkdir()
    bundle = tmp_path / "device/bundle"
    bundle.symlink_to(model.path)
    script = engine.backend.script  # type: ignore[attr-defined]

    def load(opened: Bundle, **_: object) -> Engine:
        backend = FakeBackend(script, vocab_size=tiny.VOCAB_SIZE, context_length=1024, tap_size=8)
        return Engine(backend, tiny.TOKENIZER, opened)

    monkeypatch.setattr(Engine, "load", load)

    def run(*arguments: object, server: str | None = service.url, catch: bool = False) -> Any:
        words = [bundle, *(["--server", server] if server else []), *arguments]
        return CliRunner(catch_exceptions=catch).invoke(command, [*map(str, words)])

    return run


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in EXAMPLES))
    return path


def test_the_command(
    call: Callable[..., Any], service: Service, keys: KeyStore, examples_file: Path, tmp_path: Path
) -> None:
    public = tmp_path / "keys/keys.json"
    with pytest.raises(InvalidInput, match="does not know the keys"):
        call("--examples", examples_file)
    shown = call("--examples", examples_file, "--keys", public)
    assert shown.exit_code == 0, shown.output
    sent = service.asked[-1].body
    assert f"sending 3 numbers, in {len(sent)} B: {sent.decode()}" in shown.stderr
    assert "fingerprint" in shown.stderr
    folder = tmp_path / "device/bundle.customized"
    assert pinned_keys(folder) == keys.trusted

    posted = service.count(POST)
    for _ in range(2):  # as a cron job would: no examples, no keys
        again = call("--json")
        assert again.exit_code == 0
        result = json.loads(again.stdout)
        assert (result["up_to_date"], result["sent_bytes"], result["received_bytes"]) == (True, 0, 0)
        assert "already customized with pool random" in result["reason"]
    assert service.count(POST) == posted
    assert "already customized" in call().stdout
    assert call("--again").exit_code == 0
    assert service.count(POST) == posted + 1

    service.serve(pools.write(tmp_path / "newer", adapters=pools.loras(4, seed=1), serial=200))
    upgraded = json.loads(call("--json").stdout)
    assert (upgraded["installed"], upgraded["up_to_date"], len(upgraded["alpha"])) == (True, False, 4)
    assert upgraded["sent_bytes"] == len(service.asked[-1].body)
    assert msgspec.json.encode(upgraded["sent"]) == service.asked[-1].body
    assert list(upgraded["seconds"])[:2] == ["load", "pool"]

    service.serve(pools.write(tmp_path / "older", adapters=pools.loras(seed=2), serial=150))
    with pytest.raises(ServerError, match="serial 150; one with serial 200"):
        call()
    assert call("--allow-older").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "device").iterdir()) == [
        "bundle",
        "bundle.customized",
        "bundle.customized.cache",
    ]


def test_the_command_without_signatures(call: Callable[..., Any], service: Service, examples_file: Path) -> None:
    service.keys = None
    assert call("--examples", examples_file, "--unsigned").exit_code == 0
    with pytest.raises(InvalidInput, match="does not know the keys"):
        call()
    assert call("--unsigned").exit_code == 0


def test_the_command_with_a_key(
    call: Callable[..., Any], service: Service, examples_file: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    with pytest.raises(InvalidInput, match="cannot be read"):
        call("--examples", examples_file, "--unsigned", "--api-key-file", key)
    key.write_text("0123456789abcdef\n")
    assert call("--examples", examples_file, "--unsigned", "--api-key-file", key).exit_code == 0
    assert service.asked[-1].headers["authorization"] == "Bearer 0123456789abcdef"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --pool or --server"),
        (["--pool", "x", "--server", "https://x"], "either --pool or --server"),
        (["--pool", "x", "--unsigned"], "are for --server"),
        (["--server", "https://x", "--keys", "k", "--unsigned"], "exclude each other"),
    ],
)
def test_options_that_exclude_each_other(
    arguments: list[str], message: str, call: Callable[..., Any], examples_file: Path
) -> None:
    done = call("--examples", examples_file, *arguments, server=None, catch=True)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_command_says_that_the_old_adapter_stays(
    call: Callable[..., Any], service: Service, examples_file: Path, tmp_path: Path
) -> None:
    call("--examples", examples_file, "--unsigned")
    service.edit = manifest_edit(name="worse")
    service.serve(pools.write(tmp_path / "newer", adapters=pools.loras(seed=1), serial=200))
    done = call("--unsigned")
    assert done.exit_code == 1
    assert "the earlier adapter's is" in done.stdout
    assert f"the earlier adapter stays: {tmp_path / 'device/bundle.customized/adapter'}" in done.stdout

    posted = service.count(POST)
    again = call("--unsigned")  # a cron job does not fetch it every day
    assert again.exit_code == 1
    assert "nothing changed since the last time: the log-loss of the examples is" in again.stdout
    assert json.loads(call("--unsigned", "--json").stdout)["installed"] is False
    assert service.count(POST) == posted
    service.serve(pools.write(tmp_path / "newest", adapters=pools.loras(seed=2), serial=300))
    service.edit = lambda _: None
    assert call("--unsigned").exit_code == 0


# The real service


@pytest.fixture
def address(pool: Pool, keys: KeyStore, tmp_path: Path) -> Iterator[str]:
    with real(pool, keys, tmp_path / "archives", api_key="0123456789abcdef") as url:
        yield url


def test_the_real_service_sends_prototypes(engine: Engine, keys: KeyStore, tmp_path: Path) -> None:
    pool = with_prototypes(tmp_path / "other")
    with (
        real(pool, keys, tmp_path / "archives") as url,
        PoolClient(url, trusted=keys.trusted, cache=tmp_path / "cache") as client,
    ):
        result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized", prototypes=100)
    found = read_prototypes(Bundle.open(tmp_path / "customized/adapter"), 8)
    expected = pool.prototypes.picked(result.alpha, 100) if pool.prototypes else None
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.states, expected.states)


def test_the_real_service(
    address: str, engine: Engine, pool: Pool, connect: Callable[..., PoolClient], tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match="the API key is missing or wrong"):
        assert connect(url=address).manifest
    client = connect(url=address, api_key="0123456789abcdef")
    result = customize(engine, EXAMPLES, client, folder=tmp_path / "customized")
    assert result.installed
    adapter = Bundle.open(tmp_path / "customized/adapter").as_adapter
    assert adapter.pool == pool.manifest.origin
    again = connect(url=address, api_key="0123456789abcdef")
    assert again.projection
    assert again.received_bytes == 0
    with pytest.raises(PoolChanged, match="not the version of the pool that is served"):
        again.adapter(body(pool, pool_version="0" * 16), tmp_path / "got")
    with pytest.raises(ServerError, match=r"\(422\)"):
        again.adapter(body(pool, alpha=[1.0, -1.0, 0.0]), tmp_path / "got")
