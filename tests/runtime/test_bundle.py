from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from crayon_runtime.bundle import Bundle, BundleWriter, install
from crayon_runtime.bundle.checks import check_folder
from crayon_runtime.bundle.source import Folder
from crayon_runtime.errors import BundleError, IntegrityError, InvalidInput, ManifestError, SchemaTooNew
from crayon_runtime.manifest import File
from tests.runtime.bundles import (
    ADAPTER_FILE,
    EVERY_FILE,
    FILES,
    MODEL,
    edit_manifest,
    flip_byte,
    write_adapter,
    write_model,
)
from tests.support import needs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on data being on the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


def hashed(path: Path) -> int:
    """How many bytes opening the bundle hashes: none where the stamp is trusted."""
    done: list[int] = []
    Bundle.open(path, on_bytes=done.append)
    return sum(done)


# What a bundle gives


def test_a_model(model: Path) -> None:
    bundle = Bundle.open(str(model))
    assert bundle.path == model
    assert bundle.model.name == "tiny"
    assert bundle.document == json.loads((model / "manifest.json").read_bytes())
    assert bundle.file("model.onnx").read_bytes() == FILES["model.onnx"]
    assert bundle.size == sum(file.size for file in bundle.model.files) > sum(map(len, FILES.values()))
    with pytest.raises(ManifestError, match="is a model, not an adapter"):
        bundle.as_adapter  # noqa: B018
    with pytest.raises(BundleError, match="no file 'other'"):
        bundle.file("other")


def test_an_adapter(tmp_path: Path) -> None:
    bundle = Bundle.open(write_adapter(tmp_path / "alice"))
    assert bundle.as_adapter.name == "alice"
    assert bundle.adapter_names == []
    with pytest.raises(ManifestError, match="is an adapter, not a model"):
        bundle.model  # noqa: B018


def test_the_adapters_inside_a_model(model: Path) -> None:
    bundle = Bundle.open(model)
    assert bundle.adapter_names == ["alice"]
    inside = bundle.adapter("alice")
    assert inside.as_adapter.name == "alice"
    assert inside.file("adapter.onnx_adapter").read_bytes() == ADAPTER_FILE
    inside.verify()
    assert Bundle.open(model / "adapters" / "alice").manifest == inside.manifest, "it is a bundle of its own"
    bundle.verify()
    with pytest.raises(InvalidInput, match="no adapter 'bob'") as e:
        bundle.adapter("bob")
    assert "choose one of: alice" in str(e.value)


def test_a_link_to_a_bundle_may_be_opened(model: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(model)
    assert Bundle.open(tmp_path / "current").path == model


# What opening refuses


def test_nothing_there(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "absent", "nul\0byte"):
        with pytest.raises(BundleError, match="no bundle here"):
            Bundle.open(nowhere)
    with pytest.raises(BundleError, match="neither a folder nor a file"):
        Bundle.open("/dev/null")
    with pytest.raises(ManifestError, match="not a bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_file_of_another_size_is_not_loaded(model: Path, path: str) -> None:
    with (model / path).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError):
        Bundle.open(model)


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_truncated_file_is_not_loaded(model: Path, path: str) -> None:
    os.truncate(model / path, (model / path).stat().st_size // 2)
    with pytest.raises(BundleError):
        Bundle.open(model)


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_missing_file_is_not_loaded(model: Path, path: str) -> None:
    (model / path).unlink()
    with pytest.raises(BundleError):
        Bundle.open(model)


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_flipped_byte_is_found(model: Path, tmp_path: Path, path: str) -> None:
    bundle = Bundle.open(model)
    flip_byte(model / path, -2)
    with pytest.raises(BundleError):
        bundle.verify()
    with pytest.raises(BundleError):
        Bundle.open(model)
    with pytest.raises(BundleError):
        install(model, tmp_path / "installed")
    assert not (tmp_path / "installed").exists()


def test_the_message_says_which_file_is_damaged(model: Path) -> None:
    flip_byte(model / "model.onnx.data")
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data is damaged") as e:
        Bundle.open(model)
    assert e.value.where == str(model)
    assert "again" in str(e.value)


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_link_in_place_of_a_file_is_refused(model: Path, tmp_path: Path, path: str) -> None:
    (model / path).rename(tmp_path / "elsewhere")
    (model / path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a symbolic link"):
        Bundle.open(model)
    with pytest.raises(BundleError, match="is a symbolic link"):
        install(model, tmp_path / "installed")


@pytest.mark.parametrize("folder", ["adapters", "adapters/alice"])
def test_a_link_in_place_of_a_folder_is_refused(model: Path, tmp_path: Path, folder: str) -> None:
    (model / folder).rename(tmp_path / "elsewhere")
    (model / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{folder} is a symbolic link") as e:
        Bundle.open(model)
    assert "cp -rL" in str(e.value)
    with pytest.raises(BundleError, match="is a symbolic link"):
        install(model, tmp_path / "installed")


def test_a_pipe_in_place_of_a_file_is_refused(model: Path) -> None:
    (model / "model.onnx").unlink()
    os.mkfifo(model / "model.onnx")
    with pytest.raises(IntegrityError, match="not a regular file"):
        Bundle.open(model)


def test_what_the_manifest_does_not_list_is_refused_by_verify(model: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(model)
    for foreign in (model / "notes.txt", model / "adapters" / "bob" / "manifest.json", model / ".." / "m" / "link"):
        foreign.parent.mkdir(exist_ok=True)
        if foreign.name == "link":
            foreign.symlink_to("/etc/passwd")
        else:
            foreign.write_text("{}")
        Bundle.open(model)
        with pytest.raises(IntegrityError, match="is not listed in the manifest"):
            bundle.verify()
        with pytest.raises(IntegrityError, match="is not listed in the manifest"):
            install(model, tmp_path / "installed")
        foreign.unlink()
    bundle.verify()


@pytest.mark.parametrize(
    "path, content",
    [
        ("model.onnx", b""),
        ("model.onnx", b"version https://git-lfs.github.com/spec/v1"),
        ("model.onnx", b"<!doctype html>"),
        ("golden.safetensors", b""),
        ("golden.safetensors", b"PK\3\4" * 5),
        ("golden.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        ("adapters/alice/adapter.onnx_adapter", b"\x0c\0\0\0"),
        ("adapters/alice/adapter.onnx_adapter", b"\x0c\0\0\0TORS" + bytes(200)),
    ],
)
def test_a_mislabelled_file_is_not_loaded(model: Path, path: str, content: bytes) -> None:
    """Also where the manifest knows no better."""
    (model / path).write_bytes(content)

    def size(raw: dict[str, Any]) -> None:
        next(file for file in raw["files"] if file["path"] == path)["size"] = len(content)

    edit_manifest(model, size)
    with pytest.raises(IntegrityError, match="does not begin as"):
        Bundle.open(model)


@pytest.mark.parametrize("name, identifier", [("model.pte", b"ET12"), ("model.ptd", b"FT01")])
def test_files_of_executorch_begin_as_such(tmp_path: Path, name: str, identifier: bytes) -> None:
    def write(content: bytes) -> None:
        with BundleWriter(tmp_path / "m", replace=True) as writer:
            for path, usual in FILES.items():
                writer.add_bytes(path, usual)
            writer.add_bytes(name, content)
            writer.finish(MODEL)

    write(b"\x40\0\0\0" + identifier + bytes(100))
    for content in (b"", b"\x40\0\0\0XX12" + bytes(100), b"\x40\0\0\0" + identifier):
        with pytest.raises(IntegrityError, match=f"{name} does not begin as"):
            write(content)


def test_onnxruntime_writes_adapters_with_the_header_that_is_expected(tmp_path: Path) -> None:
    adapter, path = ort.AdapterFormat(), tmp_path / "a.onnx_adapter"
    value = ort.OrtValue.ortvalue_from_numpy(np.ones((4, 2), np.float32))
    adapter.set_parameters({"lora_A.weight": value})
    adapter.export_adapter(str(path))
    (tmp_path / "manifest.json").touch()
    listed = [File(path.name, path.stat().st_size, "0" * 64)]
    check_folder(Folder(tmp_path), msgspec.structs.replace(MODEL, files=listed), nothing_else=True)


def test_a_newer_schema_is_refused(model: Path) -> None:
    with pytest.raises(SchemaTooNew):
        Bundle.open(edit_manifest(model, lambda raw: raw.update(schema_version="2.0")))


def test_a_huge_manifest_is_refused_unread(model: Path) -> None:
    os.truncate(model / "manifest.json", 1 << 40)
    with pytest.raises(ManifestError, match="1099511627776 bytes"):
        Bundle.open(model)


@pytest.mark.parametrize(
    "edit, problem",
    [
        (lambda raw: raw.update(base_fingerprint="c" * 64), "for another base"),
        (lambda raw: raw["files"][0].update(sha256="0" * 64), "not those that the model's manifest lists"),
        (lambda raw: raw["files"][0].update(path="../alice/adapter.onnx_adapter"), "not a plain relative path"),
        (lambda raw: raw.update(schema_version="7.0"), "schema version 7.0"),
    ],
)
def test_an_adapter_that_contradicts_its_model_is_refused(model: Path, edit: Any, problem: str) -> None:
    path = "adapters/alice/manifest.json"
    edit_manifest(model / "adapters" / "alice", edit)

    def vouch(raw: dict[str, Any]) -> None:
        next(file for file in raw["files"] if file["path"] == path)["size"] = (model / path).stat().st_size

    edit_manifest(model, vouch)
    with pytest.raises(BundleError, match=problem):
        Bundle.open(model)


# The stamp


def test_a_stamped_folder_is_not_hashed_again(model: Path) -> None:
    assert hashed(model) == 0


def test_a_folder_without_stamp_is_hashed_once(model: Path) -> None:
    size = Bundle.open(model).size
    (model / ".installed.json").unlink()
    assert [hashed(model), hashed(model)] == [size, 0]


@pytest.mark.parametrize("copy", [["cp", "-r"], ["cp", "-a"]])
def test_a_copied_folder_is_hashed_once(model: Path, tmp_path: Path, copy: list[str]) -> None:
    subprocess.run([*copy, model, tmp_path / "copy"], check=True)
    assert [hashed(tmp_path / "copy"), hashed(tmp_path / "copy")] == [Bundle.open(model).size, 0]


def test_a_moved_folder_is_not_hashed_again(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "moved")
    assert hashed(tmp_path / "moved") == 0


def test_a_touched_file_is_hashed_once(model: Path) -> None:
    os.utime(model / "model.onnx.data", ns=(1, 1))
    assert [hashed(model), hashed(model)] == [Bundle.open(model).size, 0]


def test_a_file_that_was_changed_and_dated_back_is_found(model: Path) -> None:
    before = (model / "model.onnx.data").stat()
    flip_byte(model / "model.onnx.data")
    after = (model / "model.onnx.data").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data is damaged"):
        Bundle.open(model)


@pytest.mark.parametrize("stamp", [b"", b"[]", b"{}", b'{"files": 1}', b"[" * 100_000, b"\xff"])
def test_a_damaged_stamp_is_as_none(model: Path, stamp: bytes) -> None:
    (model / ".installed.json").write_bytes(stamp)
    assert [hashed(model), hashed(model)] == [Bundle.open(model).size, 0]


def test_a_manifest_that_was_changed_after_the_installation_is_found(model: Path) -> None:
    manifest = model / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"context_length": 64', b'"context_length": 46'))
    with pytest.raises(IntegrityError, match=r"manifest\.json is not the one that was installed here"):
        Bundle.open(model)


def test_a_read_only_folder_works_without_a_stamp(model: Path) -> None:
    with needs.tmpfs(1 << 20) as disk:
        shutil.copytree(model, disk / "m", ignore=shutil.ignore_patterns(".installed.json"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        size = Bundle.open(model).size
        assert [hashed(disk / "m"), hashed(disk / "m")] == [size, size]
        assert not (disk / "m" / ".installed.json").exists()


def test_verify_hashes_a_stamped_folder(model: Path) -> None:
    done: list[int] = []
    bundle = Bundle.open(model, verify=True, on_bytes=done.append)
    assert sum(done) == bundle.size
    bundle.verify(done.append)
    assert sum(done) == 2 * bundle.size
