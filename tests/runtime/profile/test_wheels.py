"""The wheels of a board: packaging and pip are the judges of which ones fit."""

from __future__ import annotations

import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.tags import sys_tags

from crayon_runtime.errors import DeviceError
from crayon_runtime.profile import wheels
from crayon_runtime.profile.board import facts
from crayon_runtime.profile.wheels import Board, wheelhouse

PI = Board((3, 11), "3.11.2", "cp311", "aarch64", 36)
"""A Raspberry Pi with Debian 12."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no index: pip looks into a folder."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(wheels, "distribution", depends_on("msgspec", "click; python_version<'3.8'"))


def depends_on(*requirements: str):  # type: ignore[no-untyped-def]
    """`distribution` of an installation where the runtime depends on these alone."""

    class Runtime:
        requires = requirements

    return lambda name: Runtime() if name == wheels.RUNTIME else distribution(name)


def wheel(folder: Path, name: str, *requires: str) -> Path:
    """An empty one."""
    folder.mkdir(exist_ok=True)
    distribution_name, version = name.split("-")[:2]
    info = f"{distribution_name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {distribution_name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata + "".join(f"Requires-Dist: {r}\n" for r in requires))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {name.split('-', 2)[2].removesuffix('.whl')}\n")
    return folder / name


def found(board: Board, folder: Path | None = None, *, native: bool = False) -> list[Path]:
    steps: list[str] = []
    return wheelhouse(board, native=native, folder=folder, on_step=steps.append)[1:]


MSGSPEC = f"msgspec-{distribution('msgspec').version}"
FOR_PI = "cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"


def test_a_board_takes_the_wheels_that_packaging_says() -> None:
    assert Board.of(facts()).tags == set(sys_tags())


@pytest.mark.parametrize(
    "said, machine, newest",
    [
        ({}, "aarch64", "manylinux_2_36_aarch64"),
        ({"bits": 32}, "armv7l", "manylinux_2_36_armv7l"),
        ({"libc": ""}, "aarch64", "linux_aarch64"),
    ],
)
def test_what_a_board_says_of_itself(said: dict[str, object], machine: str, newest: str) -> None:
    pi = {
        "python": [3, 11],
        "version": "3.11.2",
        "abi": "cp311",
        "platform": "linux-aarch64",
        "bits": 64,
        "libc": "glibc 2.36",
    }
    board = Board.of(pi | said)
    assert (board.machine, board.platforms[0]) == (machine, newest)
    assert (board == PI) is not bool(said)


def test_what_is_installed_here_is_packed_where_it_fits() -> None:
    here = Board.of(facts())
    (packed,) = found(here)
    installed = distribution("msgspec")
    with zipfile.ZipFile(packed) as archive:
        assert len(archive.namelist()) > 10
        for name in archive.namelist():
            assert archive.read(name) == Path(str(installed.locate_file(name))).read_bytes()
    content = packed.read_bytes()
    packed.unlink()
    assert found(here) == [packed]
    assert packed.read_bytes() == content, "it has another hash"


def test_the_runtime_is_the_one_that_runs_here() -> None:
    runtime = wheelhouse(Board.of(facts()), native=False, folder=None, on_step=print)[0]
    with zipfile.ZipFile(runtime) as archive:
        worker = archive.read("crayon_runtime/profile/worker.py")
        assert not [name for name in archive.namelist() if "__pycache__" in name]
    assert worker == (Path(wheels.__file__).parent / "worker.py").read_bytes()


def test_what_does_not_fit_is_downloaded_once(tmp_path: Path) -> None:
    for other in (FOR_PI.replace("cp311", "cp310"), FOR_PI.replace("aarch64", "ppc64le")):
        wheel(tmp_path / "index", f"{MSGSPEC}-{other}")
    with pytest.raises(DeviceError, match="there is no wheel of msgspec for the board: ERROR: No matching") as raised:
        found(PI)
    assert raised.value.where == "Python 3.11.2 on aarch64 with glibc 2.36"
    there = wheel(tmp_path / "index", f"{MSGSPEC}-{FOR_PI}")
    (got,) = found(PI)
    assert got.read_bytes() == there.read_bytes()
    there.unlink()
    assert found(PI) == [got]


def test_the_users_wheels_come_first_with_what_they_require(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    mine = [
        wheel(folder, f"msgspec-90.1-{FOR_PI}", "other>=2", "never; sys_platform == 'win32'", "extra; extra == 'x'"),
        wheel(folder, "other-2.5-py3-none-any.whl"),
        wheel(folder, "crayon_edge_native-0.1.0-py3-none-manylinux_2_34_aarch64.whl"),
    ]
    wheel(folder, "other-1.0-py3-none-any.whl")  # too old
    wheel(folder, f"msgspec-9.1-{FOR_PI}")
    (folder / "no wheel.whl").touch()
    assert set(found(PI, folder, native=True)) == set(mine)


def test_wheels_for_another_platform(tmp_path: Path) -> None:
    wheel(tmp_path / "mine", f"msgspec-1-{FOR_PI}")
    with pytest.raises(
        DeviceError, match=f"the wheels of msgspec are for another platform: msgspec-1-{FOR_PI}"
    ) as raised:
        found(PI._replace(machine="x86_64"), tmp_path / "mine")
    assert "Python 3.11.2 on x86_64 with glibc 2.36" in str(raised.value.do)
    with pytest.raises(DeviceError, match="there is no such folder of wheels"):
        found(PI, tmp_path / "none")


def test_there_is_no_native_wheel() -> None:
    class Nothing:
        def __call__(self, name: str) -> object:
            return depends_on()(name) if name == wheels.RUNTIME else distribution("no-such-distribution")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "distribution", Nothing())
        with pytest.raises(DeviceError, match="there is no wheel of crayon-edge-native") as raised:
            found(PI, native=True)
    assert "make wheels" in str(raised.value.do)
