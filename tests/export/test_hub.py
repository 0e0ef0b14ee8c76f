"""Downloads from a hub on loopback that speaks as much of the Hugging Face Hub's protocol as the client asks for."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from crayon_export import hub
from crayon_export.checkpoint import Checkpoint
from crayon_runtime.errors import CheckpointError, OutputError
from tests.export.models import tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One repository, `owner/model`, with the branches `main` and `v2`."""

    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    refuse: tuple[int, str] | None = None
    cut_after: int | None = None
    """Break the next download of weights off after so many bytes."""
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)"""

    def downloaded(self) -> set[str]:
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that a subclass names."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        refusal = self.refusal(path)
        if refusal is not None:
            status, code = refusal
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})
        elif path.startswith("/api/"):
            self.send(200, json.dumps(self.listing(path)).encode(), {"Content-Type": "application/json"})
        else:
            self.send_file(path.partition("/resolve/")[2].partition("/")[2], body)

    def refusal(self, path: str) -> tuple[int, str] | None:
        if self.hub.refuse:
            return self.hub.refuse
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return 401, "RepoNotFound"
        if "owner/model" not in path:
            return 404, "RepoNotFound"
        revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
        return None if revision in ("main", "v2", COMMIT) else (404, "RevisionNotFound")

    def listing(self, path: str) -> object:
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.hub.files.items()]
        return {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.hub.files]}

    def send_file(self, name: str, body: bool) -> None:
        content = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        limit = self.hub.cut_after if body and name == "model.safetensors" else None
        self.send(206 if begin else 200, content[begin:], headers, body=body, limit=limit)
        if limit is not None:
            self.hub.cut_after = None
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, limit: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:limit])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHandler", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny_llama(tmp_path_factory.mktemp("model"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert hub.fetch(str(tmp_path)) == tmp_path


def test_a_model_is_downloaded_once(fake: FakeHub, model: dict[str, bytes]) -> None:
    fake.files = model
    folder = hub.fetch("owner/model")
    assert Checkpoint.open(folder).config["model_type"] == "llama"
    fake.requests.clear()
    assert hub.fetch("owner/model") == folder
    assert not fake.downloaded()


def test_only_what_an_export_reads_is_downloaded(fake: FakeHub, model: dict[str, bytes]) -> None:
    others = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "tf_model.h5", "x.py")
    fake.files = {**model, **dict.fromkeys(others, b"-"), "tokenizer.model": b"t", "original/params.json": b"{}"}
    folder = hub.fetch("owner/model", revision="v2")
    assert {f.name for f in folder.iterdir()} == {*model, "tokenizer.model"}


def test_pickled_weights_where_there_are_no_others(fake: FakeHub, model: dict[str, bytes]) -> None:
    fake.files = {"config.json": model["config.json"], "pytorch_model.bin": b"-", "README.md": b"-"}
    assert {f.name for f in hub.fetch("owner/model").iterdir()} == {"config.json", "pytorch_model.bin"}


def test_the_config_alone(fake: FakeHub, model: dict[str, bytes]) -> None:
    fake.files = model
    assert [f.name for f in hub.fetch("owner/model", weights=False).iterdir()] == ["config.json"]
    assert (hub.fetch("owner/model") / "model.safetensors").read_bytes() == model["model.safetensors"]


def test_a_download_that_was_cut_off_goes_on(fake: FakeHub, model: dict[str, bytes]) -> None:
    weights = bytes(range(256)) * 80_000  # 20 MB
    fake.files = {"config.json": model["config.json"], "model.safetensors": weights}
    fake.cut_after = 15_000_000
    try:
        folder = hub.fetch("owner/model")  # the client may try again by itself
    except CheckpointError:
        folder = hub.fetch("owner/model")

    assert (folder / "model.safetensors").read_bytes() == weights
    ranges = [r for method, path, r in fake.requests if method == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) > 1_000_000


def test_a_download_that_keeps_breaking_off(
    fake: FakeHub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.files = model

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(
        CheckpointError, match="the download of owner/model broke off: peer closed connection"
    ) as caught:
        hub.fetch("owner/model")
    assert "it goes on from there" in str(caught.value)


def test_private_models_need_the_token(fake: FakeHub, model: dict[str, bytes]) -> None:
    fake.files, fake.token = model, "hf_right"
    assert (hub.fetch("owner/model", token="hf_right") / "config.json").exists()
    with pytest.raises(
        CheckpointError, match="there is neither a folder nor a model called owner/other, or it is private"
    ):
        hub.fetch("owner/other", token="hf_wrong")


@pytest.mark.parametrize(
    "refuse, message",
    [
        ((404, "RepoNotFound"), "neither a folder nor a model called owner/model"),
        ((401, "RepoNotFound"), "or it is private"),
        ((403, "GatedRepo"), "access to owner/model has to be granted first"),
        ((403, ""), "the Hub answered 403 for owner/model"),
        ((400, ""), "the Hub answered 400 for owner/model"),
    ],
)
def test_what_the_hub_refuses(fake: FakeHub, refuse: tuple[int, str], message: str) -> None:
    fake.refuse = refuse
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.fetch("owner/model")
    assert caught.value.where == fake.url


def test_a_revision_that_does_not_exist(fake: FakeHub, model: dict[str, bytes]) -> None:
    fake.files = model
    with pytest.raises(CheckpointError, match="owner/model has no revision v9"):
        hub.fetch("owner/model", revision="v9")


def test_without_a_network(fake: FakeHub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    fake.files = model
    folder = hub.fetch("owner/model")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert hub.fetch("owner/model") == folder
        with pytest.raises(CheckpointError, match="owner/other is no folder, and the Hub cannot be reached"):
            hub.fetch("owner/other")


def test_a_cache_that_cannot_be_written(
    fake: FakeHub, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.files = model

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutputError, match="the Hub's cache cannot be written: No space left on device"):
        hub.fetch("owner/model")


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/folder", "a/b/c", "~/absent", "../absent", "a b", "a--b", "x" * 200]
)
def test_what_is_neither_a_folder_nor_a_name(fake: FakeHub, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        hub.fetch(name)
    assert not fake.requests
