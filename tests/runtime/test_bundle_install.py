from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crayon_runtime.bundle import Bundle, install, pack, unpack
from crayon_runtime.errors import BundleError, IntegrityError, ManifestError, OutputError, SchemaTooNew
from tests.runtime.bundles import EVERY_FILE, FILES, contents, edit_manifest, flip_byte, write_adapter, write_model
from tests.support import needs

Entries = list[tuple[zipfile.ZipInfo, bytes]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on data being on the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


@pytest.fixture
def archive(model: Path, tmp_path: Path) -> Path:
    return pack(model, tmp_path / "m.crayon")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crayon" / "bundles"


def rewrite(archive: Path, edit: Callable[[Entries], object], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the archive again, its entries edited by a hostile hand."""
    with zipfile.ZipFile(archive) as old:
        entries = [(zipfile.ZipInfo(name), old.read(name)) for name in old.namelist()]
    edit(entries)
    with zipfile.ZipFile(archive, "w") as new:
        for info, content in entries:
            new.writestr(info, content, compression)
    return archive


def is_refused(archive: Path, target: Path, error: type[BundleError], problem: str) -> None:
    before = sorted(os.listdir(target.parent))
    with pytest.raises(error, match=problem):
        unpack(archive, target)
    assert sorted(os.listdir(target.parent)) == before


# Installing


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_an_installed_bundle_is_the_same(model: Path, archive: Path, tmp_path: Path, source: str) -> None:
    done: list[int] = []
    bundle = install(model if source == "folder" else archive, tmp_path / "deep" / "installed", on_bytes=done.append)
    assert bundle == Bundle(tmp_path / "deep" / "installed", bundle.manifest, Bundle.open(model).document)
    assert contents(bundle.path) == contents(model)
    assert sum(done) == bundle.size
    Bundle.open(bundle.path, on_bytes=lambda _: pytest.fail("it is stamped"))


def test_nothing_to_install(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        install(tmp_path / "absent", tmp_path / "installed")


@pytest.mark.parametrize("way", ["install", "pack and unpack"])
def test_fields_of_a_newer_minor_version_are_kept(model: Path, tmp_path: Path, way: str) -> None:
    edit_manifest(model, lambda raw: raw.update(schema_version="1.7", invented={"nested": [1, None]}))
    if way == "install":
        bundle = install(model, tmp_path / "copy")
    else:
        bundle = unpack(pack(model, tmp_path / "new.crayon"), tmp_path / "copy")
    assert (bundle.path / "manifest.json").read_bytes() == (model / "manifest.json").read_bytes()
    assert bundle.document["invented"] == {"nested": [1, None]}


def test_a_newer_major_version_is_not_installed(model: Path, tmp_path: Path) -> None:
    edit_manifest(model, lambda raw: raw.update(schema_version="2.0"))
    with pytest.raises(SchemaTooNew):
        install(model, tmp_path / "copy")
    with pytest.raises(SchemaTooNew):
        pack(model, tmp_path / "new.crayon")
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "new.crayon").exists()


def test_an_existing_target_is_kept_without_replace(model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "there")
    with pytest.raises(OutputError, match="exists already"):
        install(model, tmp_path / "there")
    Bundle.open(tmp_path / "there").as_adapter  # noqa: B018
    assert install(model, tmp_path / "there", replace=True).model.name == "tiny"


def test_replace_keeps_the_old_bundle_when_the_new_one_is_damaged(model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "there")
    flip_byte(model / "tokenizer.json")
    with pytest.raises(IntegrityError):
        install(model, tmp_path / "there", replace=True)
    Bundle.open(tmp_path / "there", verify=True).as_adapter  # noqa: B018
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_replace_never_removes_what_is_not_a_bundle(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    with pytest.raises(OutputError, match="not a bundle"):
        install(model, tmp_path / "photos", replace=True)
    assert os.listdir(tmp_path / "photos") == ["1.jpg"]


def test_a_bundle_may_be_installed_over_itself(model: Path) -> None:
    before = contents(model)
    install(model, model, replace=True)
    assert contents(model) == before


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "large", weights=bytes(300_000))
    archive = pack(model, tmp_path / "large.crayon")
    with needs.tmpfs(200_000) as disk:
        for work in (
            lambda: install(model, disk / "m"),
            lambda: unpack(archive, disk / "m"),
            lambda: pack(model, disk / "m.crayon"),
            lambda: write_model(disk / "m", weights=bytes(300_000)),
        ):
            with pytest.raises(OutputError, match="disk is full"):
                work()
            assert [name for name in os.listdir(disk) if name != "m-alice"] == []


# Packing


def test_an_archive_is_a_plain_zip(model: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        names = packed.namelist()
        assert names[0] == "manifest.json"
        assert names[1:] == sorted(names[1:])
        assert {name: packed.read(name) for name in names} == contents(model)
        assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}


def test_packing_is_deterministic(model: Path, archive: Path, tmp_path: Path) -> None:
    copy = install(archive, tmp_path / "copy").path
    os.utime(copy / "model.onnx", ns=(1, 1))
    Bundle.open(copy / "adapters" / "alice")
    assert pack(copy, tmp_path / "again.crayon").read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_damaged_bundle_is_not_packed(model: Path, tmp_path: Path, path: str) -> None:
    flip_byte(model / path, -2)
    (tmp_path / "old.crayon").write_text("old")
    with pytest.raises(BundleError):
        pack(model, tmp_path / "old.crayon")
    assert (tmp_path / "old.crayon").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["m", "m-alice", "old.crayon"]


def test_a_manifest_that_was_changed_after_the_installation_is_not_packed(model: Path, tmp_path: Path) -> None:
    manifest = model / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"context_length": 64', b'"context_length": 46'))
    for work in (lambda: pack(model, tmp_path / "m.crayon"), lambda: install(model, tmp_path / "copy")):
        with pytest.raises(IntegrityError, match="not the one that was installed"):
            work()


def test_archives_beyond_the_limits_of_zip_use_zip64(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 4000)
    archive = pack(model, tmp_path / "m.crayon")
    assert b"PK\6\6" in archive.read_bytes(), "a zip64 end of central directory"
    assert contents(unpack(archive, tmp_path / "copy").path) == contents(model)


def test_memory_does_not_grow_with_the_bundle(tmp_path: Path) -> None:
    model = write_model(tmp_path / "large", weights=bytes(64 << 20))
    tracemalloc.start()
    try:
        unpack(pack(model, tmp_path / "large.crayon"), tmp_path / "copy")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


# Archives that are damaged or hostile


@pytest.mark.parametrize("path", EVERY_FILE)
def test_a_flipped_byte_in_an_archive_is_found(archive: Path, tmp_path: Path, path: str) -> None:
    with zipfile.ZipFile(archive) as packed, packed.open(path) as entry:
        content = entry.read()
    position = archive.read_bytes().index(content)
    flip_byte(archive, position + len(content) // 2)
    is_refused(archive, tmp_path / "copy", BundleError, path)


def test_no_flipped_byte_in_an_archive_changes_what_is_installed(tmp_path: Path) -> None:
    """Also where no content is: in the headers of the archive."""
    adapter = write_adapter(tmp_path / "alice")
    archive = pack(adapter, tmp_path / "alice.crayon")
    content, expected, refused = archive.read_bytes(), contents(adapter), 0
    headers = content.index(b"PK\1\2")
    for position in [*range(0, headers, 7), *range(headers, len(content))]:
        flip_byte(archive, position)
        try:
            unpack(archive, tmp_path / "copy", replace=True)
        except BundleError:
            refused += 1
        else:
            assert contents(tmp_path / "copy") == expected, position
        archive.write_bytes(content)
    assert refused > headers // 7


def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    for size in range(archive.stat().st_size - 1, 0, -499):
        os.truncate(archive, size)
        is_refused(archive, tmp_path / "copy", BundleError, "not a readable .crayon archive")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4", b"PK\5\6" + bytes(18)])
def test_what_is_not_an_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.crayon").write_bytes(content)
    is_refused(tmp_path / "x.crayon", tmp_path / "copy", BundleError, "not a readable|there is no manifest")
    with pytest.raises(BundleError, match=r"not a readable|there is no manifest"):
        Bundle.open(tmp_path / "x.crayon")


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil"])
def test_an_archive_that_wants_to_write_elsewhere_is_refused(archive: Path, tmp_path: Path, path: str) -> None:
    rewrite(archive, lambda entries: entries.append((zipfile.ZipInfo(path), b"evil")))
    is_refused(archive, tmp_path / "copy", IntegrityError, "not listed in the manifest")

    def listed(entries: Entries) -> None:
        raw = json.loads(entries[0][1])
        raw["files"].append({"path": path, "size": 4, "sha256": "0" * 64})
        entries[0] = (entries[0][0], json.dumps(raw).encode())

    rewrite(archive, listed)
    is_refused(archive, tmp_path / "copy", ManifestError, "not a plain relative path")


def test_a_file_that_is_not_in_the_manifest_is_refused(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, lambda entries: entries.append((zipfile.ZipInfo("extra.bin"), b"extra")))
    is_refused(archive, tmp_path / "copy", IntegrityError, r"extra\.bin is not listed")


def test_a_missing_file_is_refused(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, lambda entries: entries.pop(3))
    is_refused(archive, tmp_path / "copy", IntegrityError, "is missing")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("path", ["model.onnx", "manifest.json"])
def test_a_file_that_is_there_twice_is_refused(archive: Path, tmp_path: Path, path: str) -> None:
    rewrite(archive, lambda entries: entries.append((zipfile.ZipInfo(path), FILES["model.onnx"])))
    is_refused(archive, tmp_path / "copy", BundleError, "more than once")


@pytest.mark.parametrize(
    "mode, problem", [(stat.S_IFLNK, "symbolic link"), (stat.S_IFIFO, "regular"), (stat.S_IFDIR, "regular")]
)
def test_a_link_in_an_archive_is_refused(archive: Path, tmp_path: Path, mode: int, problem: str) -> None:
    def link(entries: Entries) -> None:
        index = next(i for i, (info, _) in enumerate(entries) if info.filename == "model.onnx")
        info = zipfile.ZipInfo("model.onnx")
        info.external_attr = (mode | 0o777) << 16
        entries[index] = (info, b"/etc/passwd".ljust(len(FILES["model.onnx"])))

    is_refused(rewrite(archive, link), tmp_path / "copy", IntegrityError, problem)


def test_a_folder_in_an_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, lambda entries: entries.append((zipfile.ZipInfo("adapters/"), b"")))
    is_refused(archive, tmp_path / "copy", IntegrityError, "not listed in the manifest")


def test_a_bomb_is_refused_unread(archive: Path, tmp_path: Path) -> None:
    """A small archive that would unfold to a hundred times its size."""

    def bomb(entries: Entries) -> None:
        index = next(i for i, (info, _) in enumerate(entries) if info.filename == "model.onnx.data")
        entries[index] = (entries[index][0], bytes(1 << 24))

    rewrite(archive, bomb, zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 1 << 16
    is_refused(archive, tmp_path / "copy", BundleError, "is compressed")


def test_a_compressed_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, lambda _: None, zipfile.ZIP_DEFLATED)
    is_refused(archive, tmp_path / "copy", BundleError, "is compressed; use `crayon pack`")


@pytest.mark.parametrize("size", [1, 7679, 7681, 1 << 20, (1 << 32) - 2])
def test_no_more_is_read_than_the_manifest_says(archive: Path, tmp_path: Path, size: int) -> None:
    """The archive's own directory says another size than the manifest."""
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"model.onnx.data"))
    content[at + 20 : at + 28] = size.to_bytes(4, "little") * 2
    archive.write_bytes(content)
    is_refused(archive, tmp_path / "copy", BundleError, r"model\.onnx\.data|not a readable")


def test_an_encrypted_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"model.onnx.data"))
    content[at + 8] |= 1
    archive.write_bytes(content)
    is_refused(archive, tmp_path / "copy", IntegrityError, "is encrypted")


# Opening an archive


def test_an_archive_is_installed_into_the_cache_once(archive: Path, model: Path, cache: Path) -> None:
    bundle = Bundle.open(archive)
    assert bundle.path.parent == cache
    assert bundle.path.name.startswith("tiny-")
    assert contents(bundle.path) == contents(model)
    assert Bundle.open(archive, on_bytes=lambda _: pytest.fail("it is there")).path == bundle.path


def test_another_archive_of_the_same_name_has_its_own_place(archive: Path, tmp_path: Path, cache: Path) -> None:
    other = pack(write_model(tmp_path / "other", weights=b"other"), tmp_path / "other.crayon")
    assert Bundle.open(archive).path != Bundle.open(other).path
    assert len(os.listdir(cache)) == 2


def test_a_damaged_copy_in_the_cache_is_replaced(archive: Path, model: Path) -> None:
    flip_byte(Bundle.open(archive).path / "model.onnx.data")
    assert contents(Bundle.open(archive).path) == contents(model)


def test_verify_checks_the_archive_itself(archive: Path) -> None:
    Bundle.open(archive)
    flip_byte(archive, archive.read_bytes().index(FILES["model.onnx.data"]))
    Bundle.open(archive)
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        Bundle.open(archive, verify=True)


# Processes


def start(code: str, *args: Path) -> subprocess.Popen[bytes]:
    """A process that runs `code`, with the arguments as the paths p[0], p[1]…"""
    head = (
        "import sys; from pathlib import Path; p = [Path(a) for a in sys.argv[1:]]; from crayon_runtime.bundle import *"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{head}\n{code}", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


AT_ONCE = "print(flush=True); sys.stdin.readline(); "


def run_at_once(code: str, *args: Path, processes: int = 3) -> list[tuple[int | None, str]]:
    """(exit code, stderr) of processes that wait for each other, and then run `code`."""
    started = [start(AT_ONCE + code, *args) for _ in range(processes)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    errors = [process.communicate()[1].decode() for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def test_processes_that_install_the_same_target_at_once(archive: Path, tmp_path: Path) -> None:
    ended = run_at_once("install(p[0], p[1])", archive, tmp_path / "copy")
    assert sorted(code or 0 for code, _ in ended) == [0, 1, 1]
    assert all("OutputError: the target exists already" in error for code, error in ended if code)
    Bundle.open(tmp_path / "copy", verify=True)

    ended = run_at_once("install(p[0], p[1], replace=True)", archive, tmp_path / "new")
    assert ended == [(0, "")] * 3
    Bundle.open(tmp_path / "new", verify=True)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_processes_that_open_the_same_archive_at_once(archive: Path, cache: Path) -> None:
    assert run_at_once("Bundle.open(p[0]).model", archive) == [(0, "")] * 3
    assert len(os.listdir(cache)) == 1


def test_whenever_a_process_is_killed_there_is_a_whole_bundle_or_none(archive: Path, tmp_path: Path) -> None:
    target, draw = tmp_path / "copy", random.Random(0)
    for _ in range(5):
        process = start(
            "print(flush=True)\nwhile True:\n  install(p[0], p[1], replace=True)\n  pack(p[1], p[2])",
            archive, target, tmp_path / "new.crayon",
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.communicate()
        if target.exists():
            Bundle.open(target, verify=True)
        if (tmp_path / "new.crayon").exists():
            assert (tmp_path / "new.crayon").read_bytes() == archive.read_bytes()
    install(archive, target, replace=True)
    pack(target, tmp_path / "new.crayon")
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
