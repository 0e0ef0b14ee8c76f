from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime import manifest
from crayon_runtime.errors import ManifestError, SchemaTooNew
from tests.runtime.bundles import write_adapter, write_model
from tests.support import needs

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (write_model(tmp_path_factory.mktemp("bundle") / "m") / "manifest.json").read_bytes()


def edited(document: bytes, edit: Edit) -> bytes:
    raw = json.loads(document)
    edit(raw)
    return json.dumps(raw).encode()


def file_entry(path: str) -> dict[str, object]:
    return {"path": path, "size": 1, "sha256": "0" * 64}


def test_a_manifest_survives_writing_and_reading(document: bytes) -> None:
    parsed = manifest.parse(document)
    assert isinstance(parsed, manifest.ModelManifest)
    assert manifest.to_json(parsed) == document
    assert document.endswith(b"\n")


def test_the_schema_in_the_tree_is_that_of_the_structs() -> None:
    stored = Path(manifest.__file__).with_name("manifest.schema.json")
    assert json.loads(stored.read_bytes()) == manifest.schema(), "run: python -m crayon_runtime.manifest"


def test_manifests_follow_the_schema(document: bytes, tmp_path: Path) -> None:
    jsonschema = needs.module("jsonschema")
    validator = jsonschema.Draft202012Validator(manifest.schema())
    validator.validate(json.loads(document))
    validator.validate(json.loads((write_adapter(tmp_path / "a") / "manifest.json").read_bytes()))
    assert not validator.is_valid(json.loads(edited(document, lambda raw: raw.pop("tap"))))


@pytest.mark.parametrize(
    "path",
    [
        "../model.onnx",
        "weights/../../model.onnx",
        "weights/..",
        "/etc/passwd",
        "//server/share",
        "C:/model.onnx",
        "C:model.onnx",
        "weights\\model.onnx",
        "..\\model.onnx",
        "./model",
        ".",
        "..",
        "",
        "a//b",
        "a/./b",
        "folder/",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "\ud800",
        "manifest.json",
        "MANIFEST.json",
        ".installed.json",
        "adapters/alice/.Installed.json",
    ],
)
def test_paths_that_could_leave_the_bundle_are_refused(document: bytes, path: str) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(edited(document, lambda raw: raw["files"].append(file_entry(path))))


@pytest.mark.parametrize("path", ["a", "a/b/c.bin", "..a", "a..b/c", "naïve 模型.json", " space "])
def test_plain_relative_paths_are_accepted(document: bytes, path: str) -> None:
    manifest.parse(edited(document, lambda raw: raw["files"].append(file_entry(path))))


@pytest.mark.parametrize("paths", [["x", "x"], ["Weights.bin", "weights.BIN"], ["x", "x/y"]])
def test_paths_that_cannot_be_together_are_refused(document: bytes, paths: list[str]) -> None:
    with pytest.raises(ManifestError, match=r"same path|both a file and a folder"):
        manifest.parse(edited(document, lambda raw: raw["files"].extend(map(file_entry, paths))))


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["tokenizer"].update(file="other.json"),
        lambda raw: raw["variants"]["onnx"].update(model="other.onnx"),
        lambda raw: raw["variants"]["onnx"]["data"].append("/etc/passwd"),
        lambda raw: raw["variants"].update(executorch={"program": "model.pte", "data": []}),
        lambda raw: raw["variants"].update(executorch={"program": "model.onnx", "data": ["model.ptd"]}),
        lambda raw: raw["golden"].update(tensors="other.safetensors"),
    ],
)
def test_a_reference_to_a_file_that_is_not_listed_is_refused(document: bytes, edit: Edit) -> None:
    with pytest.raises(ManifestError, match="`files` does not list"):
        manifest.parse(edited(document, edit))


@pytest.mark.parametrize(
    "variant",
    [
        {"onnx": {"file": "other.onnx_adapter"}},
        {"executorch": {"program": "adapter.pte", "data": [], "dtype": "fp32"}},
        {"executorch": {"program": "adapter.onnx_adapter", "data": ["adapter.ptd"], "dtype": "int8"}},
    ],
)
def test_an_adapter_refers_to_its_own_files(tmp_path: Path, variant: dict[str, Any]) -> None:
    document = (write_adapter(tmp_path / "a") / "manifest.json").read_bytes()
    with pytest.raises(ManifestError, match="`files` does not list"):
        manifest.parse(edited(document, lambda raw: raw.update(variants=variant)))


@pytest.mark.parametrize("folder", ["adapters/bob", "../alice", "/adapters/alice", "."])
def test_an_adapter_folder_must_be_inside_and_listed(document: bytes, folder: str) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(edited(document, lambda raw: raw["adapters"].append(folder)))


def test_adapters_have_names_of_their_own(document: bytes) -> None:
    def twice(raw: dict[str, Any]) -> None:
        raw["adapters"].append("more/alice")
        raw["files"].append(file_entry("more/alice/manifest.json"))

    with pytest.raises(ManifestError, match="same name"):
        manifest.parse(edited(document, twice))


@pytest.mark.parametrize("tap", [{"layer": 3, "size": 8}, {"layer": 2, "size": 16}])
def test_a_tap_that_the_model_does_not_have_is_refused(document: bytes, tap: dict[str, int]) -> None:
    with pytest.raises(ManifestError, match="tap"):
        manifest.parse(edited(document, lambda raw: raw.update(tap=tap)))


def test_a_newer_major_version_is_refused(document: bytes) -> None:
    with pytest.raises(SchemaTooNew, match=r"schema version 2\.0") as e:
        manifest.parse(edited(document, lambda raw: raw.update(schema_version="2.0", kind="hologram")))
    assert "upgrade crayon-edge" in str(e.value)


def test_a_newer_minor_version_is_read_without_what_it_adds(document: bytes) -> None:
    def newer(raw: dict[str, Any]) -> None:
        raw.update(schema_version="1.9", invented={"later": True})
        raw["files"][0]["compression"] = "none"

    assert manifest.parse(edited(document, newer)).schema_version == "1.9"


def test_a_manifest_from_before_repeated_layers_has_none(document: bytes) -> None:
    read = manifest.parse(edited(document, lambda raw: raw["architecture"].pop("layer_repeats")))
    assert isinstance(read, manifest.ModelManifest)
    assert (read.architecture.layer_repeats, read.architecture.passes) == (1, 2)


@pytest.mark.parametrize("repeats", [0, 65, 1.5, None])
def test_repeats_that_cannot_be_are_refused(document: bytes, repeats: object) -> None:
    with pytest.raises(ManifestError, match="layer_repeats"):
        manifest.parse(edited(document, lambda raw: raw["architecture"].update(layer_repeats=repeats)))


@pytest.mark.parametrize("version", [None, 1, 1.0, "1", "1.0.0", "one", "1.0\n", " 1.0", "-1.0", "99999.0"])
def test_a_version_that_is_none_is_refused(document: bytes, version: object) -> None:
    with pytest.raises(ManifestError, match="schema_version"):
        manifest.parse(edited(document, lambda raw: raw.update(schema_version=version)))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"schema_version": "1.0"}']
)
def test_what_is_not_a_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(content)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw.pop("base_fingerprint"),
        lambda raw: raw.update(base_fingerprint="B" * 64),
        lambda raw: raw.update(name="../tiny"),
        lambda raw: raw.update(name=""),
        lambda raw: raw.update(kind="pool"),
        lambda raw: raw.update(context_length=0),
        lambda raw: raw.update(kv_dtype="int2"),
        lambda raw: raw["files"][0].update(size=-1),
        lambda raw: raw["files"][0].update(sha256="0" * 63),
        lambda raw: raw["architecture"].update(layers="2"),
    ],
)
def test_a_field_that_breaks_the_schema_is_refused(document: bytes, edit: Edit) -> None:
    with pytest.raises(ManifestError) as e:
        manifest.parse(edited(document, edit), where="here")
    assert e.value.where == "here"
