"""Which backend a bundle is loaded with: by name, or by what is faster here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from crayon_runtime import backends
from crayon_runtime import manifest as m
from crayon_runtime.backends import choice, executorch
from crayon_runtime.backends.choice import choose, measure
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.bundle import verify
from crayon_runtime.cli.run import chat, run
from crayon_runtime.errors import BackendError
from tests.runtime import bundles
from tests.runtime.bundles import edit_manifest, write_adapter, write_model

VARIANTS = {
    "onnx": {"model": "model.onnx", "data": ["model.onnx.data"]},
    "executorch": {"program": "report.json", "data": ["model.onnx.data"]},
}
"""Of files that the bundle has; none of these tests computes."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/crayon"


@pytest.fixture
def both(tmp_path: Path) -> Bundle:
    return _model(tmp_path / "both", VARIANTS)


def _model(path: Path, variants: Iterable[str]) -> Bundle:
    chosen = {name: VARIANTS[name] for name in variants}
    return Bundle.open(edit_manifest(write_model(path), lambda raw: raw.update(variants=chosen)))


class Loader:
    """Loads fake backends. `slow` sleep at each token; `broken` do not load, `lame` give no cache."""

    def __init__(self, slow: str = "", broken: tuple[str, ...] = (), lame: str = "") -> None:
        self.slow, self.broken, self.lame = slow, broken, lame
        self.loaded: list[str] = []
        self.open_at_once = 0
        self.made: list[FakeBackend] = []

    def __call__(self, name: str) -> FakeBackend:
        self.loaded.append(name)
        if name in self.broken:
            raise BackendError(f"{name} is broken")

        def script(ids: list[int], adapter: str | None) -> int:
            time.sleep(0.01 if name == self.slow else 0)
            return 1

        backend = FakeBackend(script, vocab_size=32, context_length=64)
        if name == self.lame:
            backend.new_cache = _fail  # type: ignore[assignment]
        self.made.append(backend)
        self.open_at_once = max(self.open_at_once, sum(not backend.closed for backend in self.made))
        return backend


def _fail(*_: object) -> Any:
    raise BackendError("no cache can be made")


@pytest.mark.parametrize("slow, fast", [backends.NAMES, backends.NAMES[::-1]])
def test_the_faster_one_is_measured_and_remembered(both: Bundle, cache: Path, slow: str, fast: str) -> None:
    load = Loader(slow)
    chosen = choose(both, backends.NAMES, load, threads=None)
    assert load.loaded == [*backends.NAMES, fast]
    assert [backend.closed for backend in load.made] == [True, True, False]
    assert load.open_at_once == 2
    assert chosen is load.made[-1]
    assert all(backend.open_caches == 0 for backend in load.made)

    [kept] = (cache / "backends").iterdir()
    record = json.loads(kept.read_bytes())
    assert record["backend"] == fast
    assert record["seconds"][fast] < record["seconds"][slow]
    again = Loader(slow=fast)
    choose(both, backends.NAMES, again, threads=None)
    assert again.loaded == [fast], "what is remembered is not measured again"


def test_other_circumstances_are_measured_again(
    both: Bundle, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measures(bundle: Bundle = both, threads: int | None = None) -> bool:
        load = Loader("onnx")
        choose(bundle, backends.NAMES, load, threads=threads)
        return len(load.loaded) > 1

    assert measures()
    assert not measures()
    assert measures(threads=1)
    other = write_model(tmp_path / "other", weights=b"others" * 100)
    assert measures(Bundle.open(edit_manifest(other, lambda raw: raw.update(variants=VARIANTS))))
    monkeypatch.setattr(choice, "processor", lambda: "another machine")
    assert measures()
    monkeypatch.setattr(choice, "version", lambda name: "9.9")
    assert measures()
    assert not measures()
    for path in (cache / "backends").iterdir():
        path.write_bytes(b'{"backend": "tpu"')
    assert measures()


def test_where_memory_is_short_they_are_loaded_one_after_the_other(
    both: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "free_memory", lambda: both.size)
    load = Loader("onnx")
    choose(both, backends.NAMES, load, threads=None)
    assert load.loaded == ["onnx", "executorch", "executorch"]
    assert load.open_at_once == 1


def test_one_that_cannot_run_the_model_is_left_out_and_nothing_is_remembered(both: Bundle, cache: Path) -> None:
    for load in (Loader("onnx", broken=("executorch",)), Loader("onnx", lame="executorch")):
        assert choose(both, backends.NAMES, load, threads=None) is load.made[-1]
        assert load.loaded[-1] == "onnx"
        assert not (cache / "backends").exists()
    with pytest.raises(BackendError, match="onnx is broken"):
        choose(both, backends.NAMES, Loader(broken=backends.NAMES), threads=None)


def test_a_cache_that_cannot_be_written_is_no_error(both: Bundle, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the place of the folder")
    for _ in range(2):
        load = Loader("onnx")
        choose(both, backends.NAMES, load, threads=None)
        assert load.loaded[-1] == "executorch"


@pytest.mark.parametrize("context", [1, 2, 9, 5000])
def test_measuring_fits_into_any_context(context: int) -> None:
    backend = FakeBackend(vocab_size=7, context_length=context)
    cache = backend.new_cache()
    seconds = measure({"fake": cache}, 7, context)
    assert seconds["fake"] > 0
    assert cache.length == min(64, max(1, context // 2)) + min(8, context - max(1, context // 2))


def test_auto_takes_what_the_bundle_serves_and_what_is_installed(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def chosen(bundle: Bundle, names: list[str], load: Any, *, threads: int | None) -> FakeBackend:
        asked.append(names)
        return FakeBackend()

    monkeypatch.setattr(choice, "choose", chosen)
    monkeypatch.setattr(executorch, "is_installed", lambda: True)
    backends.load(both)
    for name in backends.NAMES:
        backends.load(_model(tmp_path / name, [name]))
    assert asked == [["onnx", "executorch"], ["onnx"], ["executorch"]]

    asked.clear()
    adapter = Bundle.open(write_adapter(tmp_path / "bob", "bob"))  # for ONNX Runtime
    backends.load(both, adapter=adapter)
    assert asked == [["onnx"]]

    asked.clear()
    monkeypatch.setattr(executorch, "is_installed", lambda: False)
    backends.load(both)
    assert asked == [["onnx"]]
    assert backends.available(both) == ["onnx"]
    assert backends.served(both) == ["onnx", "executorch"]


def test_what_cannot_be_loaded(both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "crayon_native", None)
    for bundle, name in ((both, "executorch"), (_model(tmp_path / "only", ["executorch"]), "auto")):
        with pytest.raises(BackendError, match="crayon_native") as e:
            backends.load(bundle, name)
        assert e.value.do is not None
        assert "crayon-edge[executorch]" in e.value.do
        assert "make native" in e.value.do
    with pytest.raises(BackendError, match="there is no backend 'tpu'"):
        backends.load(both, "tpu")
    with pytest.raises(BackendError, match="no variant that runs here"):
        backends.load(_model(tmp_path / "none", []))
    with pytest.raises(BackendError, match="no ONNX variant"):
        backends.load(_model(tmp_path / "program", ["executorch"]), "onnx")
    with pytest.raises(BackendError, match="no ExecuTorch variant"):
        backends.load(_model(tmp_path / "graph", ["onnx"]), "executorch")
    half = edit_manifest(both.path, lambda raw: raw.update(kv_dtype="fp16"))
    with pytest.raises(BackendError, match="ExecuTorch cannot keep a fp16 KV cache"):
        backends.load(Bundle.open(half), "executorch")


@pytest.mark.parametrize("command", [run, chat, verify])
def test_the_command_line_knows_the_names(command: Any) -> None:
    result = CliRunner().invoke(command, ["bundle", "--backend", "tpu"])
    assert result.exit_code == 2
    assert "'auto', 'onnx', 'executorch'" in result.output


def test_a_manifest_of_both_backends(tmp_path: Path) -> None:
    bundle = _model(tmp_path / "m", VARIANTS)
    assert bundle.model.variants.executorch == m.ExecutorchVariant("report.json", ["model.onnx.data"])
    assert msgspec.to_builtins(bundle.model)["variants"] == VARIANTS
    assert isinstance(bundles.MODEL.variants.executorch, msgspec.UnsetType)
