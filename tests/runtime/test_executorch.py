"""What is ExecuTorch's own about its backend: programs, threads. What all backends do is in test_real_backends.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from crayon_runtime import Engine, backends, golden
from crayon_runtime.backends.executorch import ExecutorchBackend
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.errors import AdapterError, BackendError, IntegrityError
from crayon_runtime.manifest import (
    AdapterManifest,
    AdapterVariants,
    ExecutorchAdapterVariant,
    ExecutorchVariant,
    ModelManifest,
)  # fmt: skip
from tests.programs import exported, exported_int8
from tests.runtime.bundles import flip_byte

pytestmark = pytest.mark.slow

IDS = np.arange(3, 40, dtype=np.int64)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return exported()


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """One that may be damaged."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))


@pytest.fixture
def backend(bundle: Bundle) -> ExecutorchBackend:
    return load(bundle)


def load(bundle: Bundle, threads: int | None = 1) -> ExecutorchBackend:
    loaded = backends.load(bundle, "executorch", threads=threads)
    assert isinstance(loaded, ExecutorchBackend)
    return loaded


def answer(backend: ExecutorchBackend) -> np.ndarray:
    return backend.new_cache().prefill(IDS).logits


def rebuilt(bundle: Bundle, path: Path, changed: Mapping[str, bytes]) -> Bundle:
    """The bundle with other contents in some files, which its manifest vouches for; without adapters inside."""
    with BundleWriter(path) as writer:
        for file in bundle.manifest.files:
            if not file.path.startswith("adapters/"):
                writer.add_bytes(file.path, changed.get(file.path, bundle.file(file.path).read_bytes()))
        manifest = bundle.manifest
        if isinstance(manifest, ModelManifest):
            manifest = msgspec.structs.replace(manifest, adapters=[])
        writer.finish(manifest)
    return Bundle.open(path)


# programs


@pytest.mark.parametrize("length", [256, 257, 512, 700])
def test_a_run_longer_than_a_step_is_cut(backend: ExecutorchBackend, length: int) -> None:
    assert backend.longest_step == 256
    ids = np.random.default_rng(length).integers(3, 320, length)
    whole = backend.new_cache().prefill(ids)
    cache, sums = backend.new_cache(), np.zeros(64, np.float32)
    for start in range(0, length, 256):
        step = cache.prefill(ids[start : start + 256])
        sums += step.tap_sum
    np.testing.assert_array_equal(whole.logits, step.logits)
    np.testing.assert_array_equal(whole.tap_last, step.tap_last)
    np.testing.assert_array_equal(whole.tap_sum, sums)


def test_a_changed_program_is_never_run(copy: Bundle) -> None:
    """ExecuTorch trusts a program's tables: a wrong one would be a crash."""
    backend = load(copy)
    program = copy.path / "model.pte"
    flip_byte(program, program.stat().st_size // 2)
    with pytest.raises(IntegrityError, match=r"model\.pte is damaged"):
        load(copy)
    with pytest.raises(IntegrityError, match=r"model\.pte is damaged"):
        backends.load(copy)  # "auto" does not leave it out
    for name in ("adapter.pte", "adapter.ptd"):
        adapter = Bundle.open(shutil.copytree(copy.adapter("alice").path, copy.path.parent / name))
        flip_byte(adapter.path / name, 5000)
        with pytest.raises(IntegrityError, match=rf"{name} is damaged"):
            backend.read_adapter(adapter)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.pte", lambda good: good[: len(good) // 2], "ExecuTorch refuses the program"),
        ("model.pte", lambda good: good[:8] + bytes(len(good) - 8), "ExecuTorch refuses the program"),
        ("model.ptd", lambda good: good[: len(good) // 2], "ExecuTorch refuses the program"),
        ("model.ptd", lambda good: good[:8] + bytes(len(good) - 8), "ExecuTorch refuses the program"),
    ],
)
def test_files_that_executorch_refuses(
    bundle: Bundle, tmp_path: Path, name: str, content: object, message: str
) -> None:
    """Every hash is right, and still it is no model: a broken exporter, say."""
    broken = rebuilt(bundle, tmp_path / "broken", {name: content(bundle.file(name).read_bytes())})  # type: ignore[operator]
    with pytest.raises(BackendError, match=message) as e:
        load(broken).new_cache()
    assert "crayon verify" in str(e.value.do)


def test_weights_of_another_model(bundle: Bundle, tmp_path: Path) -> None:
    adapter = bundle.adapter("alice").file("adapter.ptd").read_bytes()
    with pytest.raises(BackendError, match="ExecuTorch refuses the program"):
        load(rebuilt(bundle, tmp_path / "broken", {"model.ptd": adapter})).new_cache()


def test_a_program_that_the_manifest_does_not_describe(bundle: Bundle, tmp_path: Path) -> None:
    for change in ({"context_length": 100}, {"tap": msgspec.structs.replace(bundle.model.tap, size=32)}):
        wrong = Bundle(bundle.path, msgspec.structs.replace(bundle.model, **change), bundle.document)
        with pytest.raises(BackendError, match="not the one that the manifest describes"):
            load(wrong)


def test_golden_cases_over_an_int8_cache(cache: Path) -> None:
    results = golden.replay(exported_int8(), backend="executorch")
    assert len(results) == 4
    assert all(result.passed for result in results)
    assert max(result.logit_error for result in results) < 0.1


# adapters


def test_an_adapter_for_onnx_alone(backend: ExecutorchBackend, bundle: Bundle, tmp_path: Path) -> None:
    alice = bundle.adapter("alice")
    only = msgspec.structs.replace(alice.as_adapter.variants, executorch=msgspec.UNSET)
    with pytest.raises(AdapterError, match="has no ExecuTorch variant") as e:
        backend.read_adapter(changed(alice, variants=only))
    assert "--backend onnx" in str(e.value.do)
    with Engine.load(bundle, threads=1, adapter=changed(alice, variants=only)) as engine:
        assert (engine.backend.name, engine.adapter) == ("onnx", "alice")


def changed(adapter: Bundle, **fields: object) -> Bundle:
    return Bundle(adapter.path, msgspec.structs.replace(adapter.as_adapter, **fields), adapter.document)


def test_adapters_that_do_not_fit(backend: ExecutorchBackend, bundle: Bundle, tmp_path: Path) -> None:
    alice, bruno = bundle.adapter("alice"), bundle.adapter("bruno")
    with pytest.raises(AdapterError, match="was made for another base model"):
        backend.read_adapter(changed(alice, base_fingerprint="0" * 64))

    with BundleWriter(tmp_path / "base") as writer:  # the base's own program
        writer.add_file("model.pte", bundle.file("model.pte"))
        variants = AdapterVariants(executorch=ExecutorchAdapterVariant([], "fp32", "model.pte"))
        writer.finish(msgspec.structs.replace(alice.as_adapter, variants=variants))
    with pytest.raises(AdapterError, match="was made for another export of this model"):
        backend.read_adapter(Bundle.open(tmp_path / "base"))

    mixed = rebuilt(alice, tmp_path / "mixed", {"adapter.ptd": bruno.file("adapter.ptd").read_bytes()})
    cache = backend.new_cache()
    with pytest.raises(AdapterError, match="cannot run adapter 'alice'") as e:
        cache.reset(backend.read_adapter(mixed))
    assert "convert the adapter again" in str(e.value.do)
    assert cache.adapter is None
    np.testing.assert_array_equal(cache.prefill(IDS).logits, answer(backend))


def test_adapters_inside_name_their_program(bundle: Bundle) -> None:
    variant = bundle.model.variants.executorch
    assert isinstance(variant, ExecutorchVariant)
    assert (variant.program, variant.data) == ("model.pte", ["model.ptd"])
    assert variant.slots
    assert variant.slots.program == "adapter-slots.pte"
    manifest = bundle.adapter("alice").as_adapter
    assert isinstance(manifest, AdapterManifest)
    assert isinstance(manifest.variants.executorch, ExecutorchAdapterVariant)
    assert manifest.variants.executorch.program == "adapter.pte"
    assert backends.served(bundle.adapter("alice")) == ["onnx", "executorch"]


# threads


def test_the_threads_are_the_process_s(bundle: Bundle) -> None:
    with Engine.load(bundle, backend="executorch", threads=1):
        with Engine.load(bundle, backend="executorch"):
            pass
        with pytest.raises(BackendError, match="cannot compute on 2 threads") as e:
            Engine.load(bundle, backend="executorch", threads=2)
        assert "load each with 1, or without a number" in str(e.value.do)


# the command line


def child(code: str, bundle: Bundle, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)],
        check=True, capture_output=True, text=True, timeout=300, env=os.environ | environment,
    ).stdout  # fmt: skip


def crayon(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crayon_runtime", *map(str, args)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def test_running_needs_no_torch(bundle: Bundle) -> None:
    code = (
        "import sys; from crayon_runtime import Engine\n"
        "with Engine.load(sys.argv[1], backend='executorch', threads=1) as engine:\n"
        "    engine.generate('the sea', max_new_tokens=3)\n"
        "print([name for name in ('torch', 'onnxruntime', 'executorch') if name in sys.modules])"
    )
    assert child(code, bundle) == "[]\n"


def test_auto_measures_both(bundle: Bundle, tmp_path: Path) -> None:
    for _ in range(2):
        result = crayon("run", bundle.path, "the sea", "--json", "--max-new-tokens", "3", "--threads", "1")
        [kept] = (tmp_path / "cache/crayon/backends").iterdir()
        record = json.loads(kept.read_bytes())
        assert json.loads(result.stdout)["backend"] == record["backend"]
        assert record["seconds"].keys() == {"onnx", "executorch"}


def test_a_runner_that_does_not_load(bundle: Bundle) -> None:
    broken = {"CRAYON_NATIVE_LIBRARY": "/nowhere/libcrayon_native.so"}
    result = crayon("run", bundle.path, "the sea", "--backend", "executorch", **broken)
    assert result.returncode == 1
    assert "crayon_native cannot be imported" in result.stderr
    assert "pip install 'crayon-edge[executorch]'" in result.stderr
    result = crayon("run", bundle.path, "the sea", "--json", "--max-new-tokens", "3", **broken)
    assert json.loads(result.stdout)["backend"] == "onnx"
    result = crayon("verify", bundle.path, "--json", **broken)
    assert {case["backend"] for case in json.loads(result.stdout)["golden"]} == {"onnx"}
    assert "not run by executorch" in result.stderr


def test_verify_replays_both(bundle: Bundle) -> None:
    result = crayon("verify", bundle.path, "--json", "--threads", "1")
    assert result.returncode == 0, result.stderr
    assert [case["backend"] for case in json.loads(result.stdout)["golden"]] == ["onnx"] * 12 + ["executorch"] * 12
    result = crayon("verify", bundle.path, "--json", "--backend", "executorch", "--threads", "1")
    assert {case["backend"] for case in json.loads(result.stdout)["golden"]} == {"executorch"}
