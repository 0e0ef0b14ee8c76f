from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.errors import BundleError, IntegrityError, ManifestError, OutputError
from crayon_runtime.manifest import SCHEMA_VERSION, AdapterManifest, AdapterVariants, File
from tests.runtime.bundles import BASE, FILES, MODEL, PRODUCER, contents, flip_byte, write_adapter, write_model
from tests.support import ROOT

ADAPTER = AdapterManifest(
    schema_version=SCHEMA_VERSION,
    name="empty",
    base_fingerprint=BASE,
    producer=PRODUCER,
    targets=[],
    variants=AdapterVariants(),
    files=[],
)


def test_files_are_hashed_while_they_are_written(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with BundleWriter(tmp_path / "b") as writer:
        with writer.open("deep/down/data") as file:
            assert file.tell() == 0
            assert file.write(array.data) == 24
            assert file.write(memoryview(b"tail")) == 4
            assert file.tell() == 28
        writer.add_bytes("a", b"")
        content = array.tobytes() + b"tail"
        listed = [
            File("a", 0, hashlib.sha256(b"").hexdigest()),
            File("deep/down/data", 28, hashlib.sha256(content).hexdigest()),
        ]
        assert writer.files == listed
        writer.finish(ADAPTER)
        assert not (tmp_path / "b").exists()
    bundle = Bundle.open(tmp_path / "b", on_bytes=lambda _: pytest.fail("it is stamped"))
    bundle.verify()
    assert bundle.manifest.files == listed
    assert bundle.file("deep/down/data").read_bytes() == content
    assert os.listdir(tmp_path) == ["b"]


def test_a_file_is_copied(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(content)
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_file("copy", tmp_path / "source")
        with pytest.raises(FileNotFoundError):
            writer.add_file("other", tmp_path / "absent")
        writer.finish(ADAPTER)
    assert Bundle.open(tmp_path / "b", verify=True).file("copy").read_bytes() == content


def test_an_adapter_travels_inside_a_model(tmp_path: Path) -> None:
    bundle = Bundle.open(write_model(tmp_path / "m"), verify=True)
    assert bundle.model.adapters == ["adapters/alice"]
    assert contents(bundle.path / "adapters" / "alice") == contents(tmp_path / "m-alice")
    paths = [file.path for file in bundle.model.files]
    assert {"adapters/alice/manifest.json", "adapters/alice/adapter.onnx_adapter"} < set(paths)
    assert paths == sorted(paths)


def test_an_adapter_for_another_base_may_not_travel_inside(tmp_path: Path) -> None:
    bob = Bundle.open(write_adapter(tmp_path / "bob", "bob", base="c" * 64))
    with pytest.raises(ManifestError, match="for another base"), BundleWriter(tmp_path / "m") as writer:
        for path, content in FILES.items():
            writer.add_bytes(path, content)
        writer.add_bundle("adapters/bob", bob)
        writer.finish(MODEL)
    assert os.listdir(tmp_path) == ["bob"]


def test_a_damaged_adapter_may_not_travel_inside(tmp_path: Path) -> None:
    bob = Bundle.open(write_adapter(tmp_path / "bob"))
    flip_byte(bob.path / "adapter.onnx_adapter")
    with pytest.raises(IntegrityError), BundleWriter(tmp_path / "m") as writer:
        writer.add_bundle("adapters/bob", bob)
    with pytest.raises(ManifestError, match="is a model"), BundleWriter(tmp_path / "n") as writer:
        writer.add_bundle("adapters/m", Bundle.open(write_model(tmp_path / "m")))


@pytest.mark.parametrize("path", ["../x", "/x", "a\\b", "manifest.json", ".installed.json", "", "."])
def test_paths_that_no_bundle_may_have_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match="plain relative path"), BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes(path, b"")
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="written already"), BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes("x", b"")
        writer.add_bytes("x", b"")


def test_a_manifest_that_could_not_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="`files` does not list"), BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes("tokenizer.json", b"{}")
        writer.finish(MODEL)
    with pytest.raises(IntegrityError, match="does not begin as"), BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes("x.safetensors", b"text")
        writer.finish(ADAPTER)
    with pytest.raises(ManifestError, match="tap"), BundleWriter(tmp_path / "b") as writer:
        for path, content in FILES.items():
            writer.add_bytes(path, content)
        writer.finish(
            msgspec.structs.replace(MODEL, context_length=64, tap=msgspec.structs.replace(MODEL.tap, layer=9))
        )
    assert os.listdir(tmp_path) == []


def test_without_finish_there_is_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes("x", b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_bundle_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "b") as writer:
        writer.finish(ADAPTER)
        raise error
    assert os.listdir(tmp_path) == []


def test_a_file_that_failed_is_not_part_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is not listed"), BundleWriter(tmp_path / "b") as writer:
        with pytest.raises(RuntimeError), writer.open("x") as file:
            file.write(b"half")
            raise RuntimeError
        writer.finish(ADAPTER)


def test_replace_keeps_the_old_bundle_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = write_model(tmp_path / "m")
    with pytest.raises(OutputError, match="exists already"):
        write_model(target)
    with pytest.raises(RuntimeError), BundleWriter(target, replace=True) as writer:
        writer.add_bytes("x", b"x")
        raise RuntimeError
    Bundle.open(target, verify=True)
    write_model(target, weights=b"new", replace=True)
    assert Bundle.open(target, verify=True).file("model.onnx.data").read_bytes() == b"new"


def test_replace_never_removes_what_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    with pytest.raises(OutputError, match="not a bundle"):
        write_model(tmp_path / "photos", replace=True)
    assert os.listdir(tmp_path / "photos") == ["1.jpg"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_writer_that_is_killed_leaves_no_bundle_and_the_next_one_succeeds(tmp_path: Path, finished: bool) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.runtime.test_bundle_writer import ADAPTER, BundleWriter\n"
        "with BundleWriter(Path(sys.argv[1])) as writer:\n"
        "    writer.add_bytes('x', b'x')\n"
        f"    if {finished}: writer.finish(ADAPTER)\n"
        "    print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(".m.partial-")
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "m")
    if not finished:
        with pytest.raises(BundleError):
            Bundle.open(tmp_path / leftover)
    write_model(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m", "m-alice"]
