"""`crayon-bench`, the measuring program of devices without Python: its files for a device, and its JSON as records of a profile."""

from __future__ import annotations

import platform
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec
from msgspec import Struct

from crayon_runtime.errors import BackendError, DeviceError
from crayon_runtime.profile.memory import KEPT
from crayon_runtime.profile.push import Item
from crayon_runtime.profile.records import Absent, Observation

NAME = "crayon-bench"
SYSTEM = "system"
"""The folder of a C library of its own, for systems that have another one than glibc: Android."""

_MACHINES = {62: "x86_64", 183: "aarch64"}
"""ELF's `e_machine`."""

LACKS = (
    "TTFT", "adapter swap", "affinity of ten examples", "routing overhead", "the controls, and with them the share of the bandwidth",
)  # fmt: skip
"""What it does not measure: all that is more than a backend."""


class Row(Struct, frozen=True):
    """One test, as `crayon-bench` prints it."""

    adapter: str | None
    n_prompt: int
    n_gen: int
    n_depth: int
    load_ns: int
    first_token_ns: int
    cached_bytes: int | None
    model_size: int
    rss_bytes: int | None
    pss_bytes: int | None
    max_rss_kb: int
    warmup_ns: list[int]
    samples_ns: list[int]
    token_ns: list[list[int]]


class Files(NamedTuple):
    """What goes to the device."""

    items: list[Item]
    loader: str | None
    """The path of the C library's loader among them; None: the device has one."""

    def command(self, folder: str) -> list[str]:
        """How it is started, where its files are in `folder`."""
        program = f"{folder}/{NAME}"
        if self.loader is None:
            return [program]
        return [f"{folder}/{self.loader}", "--library-path", f"{folder}:{folder}/{SYSTEM}", program]


@contextmanager
def files(machine: str, given: Path | None) -> Iterator[Files]:
    """The program and its libraries.

    Args:
        machine: the device's processor, as `uname -m` says it.
        given: an archive that `make wheels` made, a wheel of crayon-edge-native, a folder, or a single file; None: what is installed here.

    Raises:
        DeviceError: there is none for this processor.
    """
    with TemporaryDirectory() as temporary:
        root = _unpacked(given, machine, Path(temporary))
        program = next((path for path in sorted(root.rglob(NAME)) if path.is_file()), None) if root.is_dir() else root
        if program is None:
            raise DeviceError(f"there is no {NAME} in it", where=given, do=_ADVICE.format(machine))
        made_for = _machine(program)
        if made_for != machine:
            raise DeviceError(
                f"this {NAME} is for {made_for}, and the device has a processor of {machine}",
                where=given or program,
                do=_ADVICE.format(machine),
            )
        there = [program]
        if root.is_dir():
            there = sorted(
                p for p in program.parent.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".typed")
            )
        names = [NAME if path == program else str(path.relative_to(program.parent)) for path in there]
        loader = next((name for name in names if name.startswith(f"{SYSTEM}/ld-")), None)
        yield Files([Item.of(name, path) for name, path in zip(names, there, strict=True)], loader)


def rows(content: bytes) -> list[Row]:
    """What it printed; BackendError if that is something else."""
    try:
        return msgspec.json.decode(content, type=list[Row])
    except msgspec.DecodeError as e:
        raise BackendError(
            f"{NAME} said {content[:200]!r}: {e}", do="give one of the version of this package with --bench"
        ) from None


def observations(measured: list[Row], adapter: str | None) -> Iterator[Observation | Absent]:
    """The tests of a process, of those with the adapter if there is one; and what it does not measure."""
    base = next(row for row in measured if row.adapter is None)
    yield Observation(test="load_warm", samples_ns=[base.load_ns])
    yield Observation(test="first_token", n_prompt=1, samples_ns=[base.first_token_ns])
    for row in measured:
        if (row.adapter is not None) == (adapter is not None):
            yield Observation(
                test="prefill" if row.n_prompt else "decode",
                n_prompt=row.n_prompt,
                n_gen=row.n_gen,
                n_depth=row.n_depth,
                adapter=adapter,
                warmup_ns=row.warmup_ns,
                samples_ns=row.samples_ns,
                token_ns=row.token_ns,
            )
    yield from (Absent(what=what, reason=f"{NAME} measures the backend alone") for what in LACKS)


def cold(row: Row) -> Observation | Absent:
    """Loading after the page cache was dropped."""
    kept = row.cached_bytes or 0
    if row.cached_bytes is None or kept > KEPT * row.model_size:
        return Absent(what="load_cold", reason=f"the system keeps {kept} bytes of the model in its page cache")
    return Observation(test="load_cold", samples_ns=[row.load_ns])


_ADVICE = "make one for {0} with `make wheels` in a clone, and give dist/crayon-bench-{0}.tar.gz with --bench"


def _unpacked(given: Path | None, machine: str, temporary: Path) -> Path:
    if given is None:
        found = find_spec("crayon_native")
        if found is None or found.origin is None or platform.machine() != machine:
            raise DeviceError(f"there is no {NAME} for {machine} here", do=_ADVICE.format(machine))
        return Path(found.origin).parent
    if not given.exists():
        raise DeviceError(f"there is no such {NAME}", where=given, do=_ADVICE.format(machine))
    try:
        if given.is_file() and tarfile.is_tarfile(given):
            with tarfile.open(given) as archive:
                archive.extractall(temporary, filter="data")
            return temporary
        if given.is_file() and zipfile.is_zipfile(given):
            with zipfile.ZipFile(given) as wheel:
                wheel.extractall(temporary)
            return temporary
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as e:
        raise DeviceError(f"the archive cannot be read: {e}", where=given, do=_ADVICE.format(machine)) from None
    return given


def _machine(program: Path) -> str:
    with program.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF":
        return "no processor at all: it is no program"
    return _MACHINES.get(int.from_bytes(head[18:20], "little"), "another processor")
