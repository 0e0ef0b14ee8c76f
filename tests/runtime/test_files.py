from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crayon_runtime import files
from crayon_runtime.errors import OutputError
from crayon_runtime.files import atomic_directory, atomic_file, sha256_file
from tests.support import needs


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with atomic_directory(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not target.exists()
        assert folder.parent == target.parent
        assert folder.name.startswith(f".target.partial-{os.getpid()}-")
    assert (target / "inner" / "file").read_text() == "text"
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_target_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already") as e, atomic_directory(target):
        pytest.fail("the work was begun")
    assert e.value.where == str(target)
    assert names(tmp_path) == ["target"]


@pytest.fixture(params=["one step", "two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system call that swaps two paths, and on systems without it."""
    if request.param == "two steps":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_replace_swaps_at_the_end(tmp_path: Path, kind: str) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("untouched")
    if kind == "link":
        target.symlink_to(elsewhere)
    elif kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "old").touch()
    with atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("new")
        assert not (target / "new").exists()
    assert names(target) == ["new"]
    assert not target.is_symlink()
    assert (elsewhere / "file").read_text() == "untouched"
    assert names(tmp_path) == ["elsewhere", "target"]


def test_replace_keeps_the_old_folder_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_replace_keeps_the_old_folder_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.startswith(".target.partial") and not to.exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"), atomic_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_of_two_writers_of_one_target_the_first_to_end_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(OutputError, match="exists already"), atomic_directory(target) as slow:
        (slow / "slow").touch()
        with atomic_directory(target) as fast:
            (fast / "fast").touch()
    assert names(target) == ["fast"]
    assert names(tmp_path) == ["target"]


WRITER = """
import sys
from pathlib import Path
from crayon_runtime.files import atomic_directory, atomic_file
target = Path(sys.argv[2])
if sys.argv[1] == "folder":
    with atomic_directory(target, replace=True) as folder:
        (folder / "file").write_text("half")
        print("writing", flush=True)
        sys.stdin.read()
else:
    with atomic_file(target) as file:
        file.write(b"half")
        file.flush()
        print("writing", flush=True)
        sys.stdin.read()
"""


def start_writer(kind: str, target: Path) -> subprocess.Popen[bytes]:
    """A process that is in the middle of writing `target`, until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    with start_writer(kind, target) as process:
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".target.partial-")

    with atomic_directory(tmp_path / "other"):
        pass
    assert leftover in names(tmp_path), "the leftovers of another target are not ours"
    if kind == "folder":
        with atomic_directory(target):
            pass
    else:
        with atomic_file(target) as file:
            file.write(b"whole")
    assert names(tmp_path) == ["other", "target"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with start_writer("folder", target) as process:
        with atomic_directory(target) as folder:
            (folder / "file").write_text("ours")
        assert (target / "file").read_text() == "ours"
        assert len(names(tmp_path)) == 2
        process.communicate()
    assert (target / "file").read_text() == "half"
    assert names(tmp_path) == ["target"]


def test_a_full_disk_is_a_clear_error() -> None:
    with needs.tmpfs(64 * 1024) as disk:
        with pytest.raises(OutputError, match="disk is full") as e, atomic_directory(disk / "target") as folder:
            (folder / "file").write_bytes(bytes(128 * 1024))
        assert "free some space" in str(e.value)
        with pytest.raises(OutputError, match="disk is full"), atomic_file(disk / "target") as file:
            file.write(bytes(128 * 1024))
        assert names(disk) == []
        with atomic_file(disk / "target") as file:
            file.write(bytes(32 * 1024))


def test_a_read_only_file_system_is_a_clear_error() -> None:
    with needs.tmpfs(64 * 1024) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OutputError, match="read-only"), atomic_directory(disk / "target"):
            pytest.fail("the work was begun")
        with pytest.raises(OutputError, match="read-only"), atomic_file(disk / "target"):
            pytest.fail("the work was begun")


def test_a_file_in_the_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), atomic_directory(tmp_path / "file" / "target"):
        pytest.fail("the work was begun")


def test_the_errors_of_what_the_block_reads_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "target"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "source"))
    assert names(tmp_path) == []


def test_a_file_appears_in_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with atomic_file(target) as file:
        file.write(b"old")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    with atomic_file(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["target"]


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder in the place"), atomic_file(tmp_path):
        pytest.fail("the work was begun")


def test_new_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "folder"):
            pass
        with atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 1, files.CHUNK, files.CHUNK + 1])
def test_sha256_of_a_file(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    done: list[int] = []
    assert sha256_file(tmp_path / "file", done.append) == hashlib.sha256(content).hexdigest()
    assert sum(done) == size


def test_what_a_dead_writer_had_moved_aside_comes_back(tmp_path: Path) -> None:
    target, aside = tmp_path / "target", tmp_path / ".target.replaced-0123abcd"
    aside.mkdir()
    (aside / "old").touch()
    (tmp_path / ".target.replaced-by-me").touch()
    files.recover(target)
    assert [path.name for path in target.iterdir()] == ["old"]
    aside.mkdir()
    with files.atomic_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.replaced-by-me", "target"]
    files.recover(tmp_path / "nowhere/target")
