"""The wheels that a board needs to run bundles, which need neither an index nor pip there.

The runtime itself is the one that runs here. Of everything that it depends on, a wheel that fits the board's Python, processor and C library
comes from the first of these that has one: a folder that the user names; what is installed here, packed again; `pip download`, of the
same version as here. The last two are kept in the user's cache.
"""

from __future__ import annotations

import email
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, parse_tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

import crayon_runtime
from crayon_runtime._version import __version__
from crayon_runtime.errors import DeviceError
from crayon_runtime.files import atomic_file
from crayon_runtime.profile.target import OnStep

RUNTIME, NATIVE = "crayon-edge", "crayon-edge-native"

_LEGACY = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
"""PEP 600: names of manylinux_2_N from before there was N."""


class Board(NamedTuple):
    """What decides which wheels fit."""

    python: tuple[int, int]
    version: str
    """As `python`, to the last digit."""
    abi: str
    machine: str
    glibc: int | None
    """The N of 2.N; None: the board has another C library."""

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Board:
        """From what the board says: see `crayon_runtime.profile.board.facts`."""
        major, minor = facts["python"]
        machine = facts["platform"].partition("-")[2].replace("-", "_")
        if machine == "aarch64" and facts["bits"] == 32:  # the kernel is of 64 bits, and everything else is not
            machine = "armv7l"
        name, _, libc = facts["libc"].partition(" ")
        glibc = int(libc.split(".")[1]) if name == "glibc" else None
        return cls((major, minor), facts["version"], facts["abi"], machine, glibc)

    def __str__(self) -> str:
        libc = "another C library than glibc" if self.glibc is None else f"glibc 2.{self.glibc}"
        return f"Python {self.version} on {self.machine} with {libc}"

    @property
    def platforms(self) -> list[str]:
        """The newest first."""
        names = [] if self.glibc is None else [f"manylinux_2_{minor}" for minor in range(self.glibc, 4, -1)]
        names += [name for name, minor in _LEGACY.items() if self.glibc is not None and minor <= self.glibc]
        return [f"{name}_{self.machine}" for name in (*names, "linux")]

    @property
    def tags(self) -> frozenset[Tag]:
        """Of all wheels that it can use."""
        own = cpython_tags(self.python, [self.abi], self.platforms)
        return frozenset([*own, *compatible_tags(self.python, "cp{}{}".format(*self.python), self.platforms)])

    @property
    def markers(self) -> dict[str, str]:
        """PEP 508's, for conditions of dependencies."""
        return {
            "implementation_name": "cpython", "implementation_version": self.version, "os_name": "posix",
            "platform_machine": self.machine, "platform_python_implementation": "CPython", "platform_release": "",
            "platform_system": "Linux", "platform_version": "", "python_full_version": self.version,
            "python_version": "{}.{}".format(*self.python), "sys_platform": "linux",
        }  # fmt: skip


def wheelhouse(board: Board, *, native: bool, folder: Path | None, on_step: OnStep) -> list[Path]:
    """All wheels that the board needs, the runtime's own first.

    Args:
        native: with what runs programs of ExecuTorch.
        folder: the user's wheels.
        on_step: is told what is downloaded.

    Raises:
        DeviceError: there is no wheel of something that fits the board.
    """
    from platformdirs import user_cache_path

    cache = user_cache_path("crayon", appauthor=False) / "wheels"
    source = _Source(board, cache, folder, on_step)
    found: dict[str, Path] = {RUNTIME: _runtime(cache)}
    wanted = [*_required(distribution(RUNTIME), frozenset(), board), *([Requirement(NATIVE)] if native else [])]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = found.get(name) or source.find(name, requirement)
        wanted += _required(_inside(found[name]), extras, board)
    return list(found.values())


class _Source:
    """Where wheels come from."""

    def __init__(self, board: Board, cache: Path, folder: Path | None, on_step: OnStep) -> None:
        self._board = board
        self._tags = board.tags
        self._cache = cache
        self._folder = folder
        self._on_step = on_step
        if folder is not None and not folder.is_dir():
            raise DeviceError("there is no such folder of wheels", where=folder, do="check --wheels")

    def find(self, name: str, requirement: Requirement) -> Path:
        """A wheel that fits, wherever it is found first."""
        if self._folder is not None:
            there = list(self._versions(self._folder, name, requirement))
            fitting = [path for _, path, fits in sorted(there) if fits]
            if fitting:
                return fitting[-1]
            if there:
                raise DeviceError(
                    f"the wheels of {name} are for another platform: {', '.join(path.name for _, path, _ in there)}",
                    where=self._folder,
                    do=f"the board has {self._board}: get wheels for it, as with `pip download --platform "
                    f"{self._board.platforms[0]} --python-version {self._board.python[0]}.{self._board.python[1]}`",
                )
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            return self._downloaded(name, requirement)
        packed = self._packed(installed)
        return packed or self._downloaded(name, Requirement(f"{name}=={installed.version}"))

    def _versions(self, folder: Path, name: str, requirement: Requirement) -> Iterator[tuple[object, Path, bool]]:
        for path in folder.glob("*.whl"):
            try:
                whose, version, _, tags = parse_wheel_filename(path.name)
            except InvalidWheelFilename:
                continue
            if whose == name and requirement.specifier.contains(version, prereleases=True):
                yield version, path, not tags.isdisjoint(self._tags)

    def _packed(self, installed: Distribution) -> Path | None:
        """What is installed here, as one file; None if it does not fit, or was not installed from a wheel."""
        tags = email.message_from_string(installed.read_text("WHEEL") or "").get_all("Tag", [])
        record = installed.read_text("RECORD")
        if record is None or not any(not parse_tag(tag).isdisjoint(self._tags) for tag in tags):
            return None
        if '"editable": true' in (installed.read_text("direct_url.json") or ""):
            return None
        key = hashlib.sha256(record.encode()).hexdigest()[:16]
        path = self._cache / "installed" / key / f"{_file_name(installed)}-{tags[0]}.whl"
        if not path.exists():
            inside = [file for file in installed.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
            with atomic_file(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for file in sorted(inside):
                    _add(archive, file.as_posix(), Path(str(file.locate())))
        return path

    def _downloaded(self, name: str, requirement: Requirement) -> Path:
        board = self._board
        folder = self._cache / "downloaded" / f"{board.abi}-{board.platforms[0]}"
        kept = [path for _, path, fits in self._versions(folder, name, requirement) if fits]
        if kept:
            return kept[-1]
        self._on_step(f"downloading {requirement} for the board")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            command = [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
                *("--only-binary", ":all:", "--dest", new, "--implementation", "cp"),
                *("--python-version", "{}.{}".format(*board.python)),
                *(part for abi in (board.abi, "abi3", "none") for part in ("--abi", abi)),
                *(part for platform in board.platforms for part in ("--platform", platform)),
                str(requirement),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["pip said nothing"]
                raise DeviceError(
                    f"there is no wheel of {name} for the board: {said[-1]}",
                    where=f"{board}",
                    do="give wheels that fit with --wheels DIR"
                    + (", made by `make wheels` in a clone" if name == NATIVE else ""),
                )
            (path,) = Path(new).glob("*.whl")
            return path.rename(folder / path.name)


def _runtime(cache: Path) -> Path:
    """The runtime as it runs here: pure Python, so it fits everywhere; and what the board says is what is understood here."""
    root = Path(crayon_runtime.__file__).parent
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                _add(archive, f"{root.name}/{path.relative_to(root).as_posix()}", path)
    key = hashlib.sha256(content.getbuffer()).hexdigest()[:16]
    made = cache / "installed" / key / f"crayon_edge-{__version__}-py3-none-any.whl"
    if not made.exists():
        with atomic_file(made) as out:
            out.write(content.getbuffer())
    return made


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """With a date that is always the same, so that the same files make the same wheel."""
    archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), archive.compression, archive.compresslevel)


def _file_name(installed: Distribution) -> str:
    return f"{canonicalize_name(installed.name).replace('-', '_')}-{installed.version}"


def _inside(wheel: Path) -> Distribution:
    """What a wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    return PathDistribution(zipfile.Path(wheel, f"{folder}/"))


def _required(of: Distribution, extras: frozenset[str], board: Board) -> list[Requirement]:
    """What a distribution needs on the board, with some of its extras."""
    found = map(Requirement, of.requires or [])
    return [
        r
        for r in found
        if r.marker is None or any(r.marker.evaluate(board.markers | {"extra": extra}) for extra in ("", *extras))
    ]
