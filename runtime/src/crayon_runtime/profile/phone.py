"""A phone as adb reaches it: found, held, with files on it. What adbutils raises when it goes is an error of ours."""

from __future__ import annotations

import hashlib
import re
import shlex
import struct
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from crayon_runtime.errors import BackendError, DeviceError, MissingExtra
from crayon_runtime.profile.push import Item, check_sent, total
from crayon_runtime.profile.target import OnStep

if TYPE_CHECKING:
    import adbutils

ROOT = "/data/local/tmp/crayon-edge"
OLDEST = 26
"""The oldest Android, by its API level: Android 8."""

_ABIS = {"arm64-v8a": "aarch64", "x86_64": "x86_64"}

# The lock is the shell's, and ends with it. What the connection's end leaves running is ended, whatever ended the connection.
_HOLD = f"""
umask 022; mkdir -p {ROOT} && cd {ROOT} || exit; exec 9>lock; flock -n 9 || {{{{ echo taken; exit; }}}}
trap '' HUP; rm -rf run; mkdir run; echo held; read end; {{end}} 2>/dev/null; rm -rf run
"""

_FACTS = """
for p in build.version.sdk product.cpu.abi product.manufacturer product.model; do echo $(getprop ro.$p 2>/dev/null); done
uname -s -r -m; uname -m
"""


class Phone(NamedTuple):
    """What it says of itself."""

    machine: str
    system: str
    model: str
    """Empty where there are no properties, as on another Linux."""

    @classmethod
    def of(cls, device: adbutils.AdbDevice) -> Phone:
        """What there is; DeviceError if it is too old, or of a kind that nothing was built for."""
        sdk, abi, maker, model, system, machine = (line.strip() for line in say(device, _FACTS).splitlines())
        if sdk and int(sdk) < OLDEST:
            raise DeviceError(
                f"the phone's Android is too old: its API level is {sdk}, and {OLDEST} (Android 8) is needed",
                where=device.serial,
                do="use another phone",
            )
        return cls(_ABIS.get(abi, abi or machine), system, f"{maker} {model}".strip())


class Group(NamedTuple):
    """Files that lie together on the device."""

    folder: str
    items: list[Item]

    @classmethod
    def of(cls, items: list[Item]) -> Group:
        names = "".join(f"{item.sha256} {item.path}\n" for item in items)
        return cls(f"{ROOT}/{hashlib.sha256(names.encode()).hexdigest()[:16]}", items)


def find(serial: str | None) -> adbutils.AdbDevice:
    """One that can be used; DeviceError if there is none, or not one alone."""
    try:
        import adbutils
    except ModuleNotFoundError as e:
        raise MissingExtra("device", "profiling over adb") from e
    client = adbutils.AdbClient()
    listed = {info.serial: info.state for info in client.list()}
    names = ", ".join(listed) or "none"
    if serial is None and len(listed) > 1:
        raise DeviceError(f"several devices are connected: {names}", where="adb:", do="name one: --target adb:SERIAL")
    serial = serial or next(iter(listed), None)
    if serial not in listed:
        raise DeviceError(
            "no device is connected" if serial is None else f"there is no device {serial}; connected: {names}",
            where=f"adb:{serial or ''}",
            do="connect it, and allow USB debugging in its developer options: `adb devices` lists what is there",
        )
    state = listed[serial]
    if state == "unauthorized":
        raise DeviceError(
            "the device does not trust this computer yet",
            where=f"adb:{serial}",
            do="unlock it, and allow USB debugging there",
        )
    if state != "device":
        raise DeviceError(
            f"the device cannot be used, adb says: {state}",
            where=f"adb:{serial}",
            do="connect it again, or `adb reconnect`",
        )
    return client.device(serial)


@contextmanager
def locked(device: adbutils.AdbDevice, name: str, *, end: str) -> Iterator[None]:
    """Hold the device's lock, and a folder for what runs.

    Args:
        end: the command that ends what runs.
    """
    import adbutils

    with device.shell(_HOLD.format(end=end).strip(), stream=True, timeout=None) as held:
        said = b""
        while b"\n" not in said:
            more = held.recv(4096)
            if not more:
                break
            said += more
        if b"taken" in said:
            raise BackendError(
                "another profile is being made on this device, and the two would measure each other",
                where=name,
                do="wait until it has ended, or end it",
            )
        if b"held" not in said:
            raise DeviceError(
                f"nothing can be written on the device: {said.decode(errors='replace').strip()}",
                where=f"{name}: {ROOT}",
                do="look whether /data/local/tmp is there, and whether there is space left",
            )
        try:
            yield
        finally:
            with suppress(OSError, adbutils.AdbError):  # the device may be gone
                held.conn.settimeout(10)
                held.send(b"\n")
                while held.recv(4096):
                    pass


def send(device: adbutils.AdbDevice, groups: Sequence[Group], on_step: OnStep) -> None:
    """Put there what is missing."""
    on_step("what is on the device already")
    wanted = {f"{group.folder}/{item.path}": item for group in groups for item in group.items}
    there = _hashes(device, list(wanted))
    missing = {path: item for path, item in wanted.items() if there.get(path) != item.sha256}
    if not missing:
        return
    needed = total(missing.values())
    if (free := _free(device)) < needed:
        kept = "|".join(group.folder.rpartition("/")[2] for group in groups)
        say(device, f"cd {ROOT} && for d in ????????????????; do case $d in {kept}) ;; *) rm -rf $d;; esac; done")
        if (free := _free(device)) < needed:
            raise _no_space(device, f": {needed / 1e6:.1f} MB are needed, and {free / 1e6:.1f} MB free")
    on_step(f"sending {len(missing)} of {len(wanted)} files, {needed / 1e6:.1f} MB")
    import adbutils

    for path, item in missing.items():
        say(device, f"umask 022; {shlex.join(['mkdir', '-p', path.rpartition('/')[0]])}")  # an app reads it, too
        partial = f"{ROOT}/run/partial"
        try:
            device.sync.push(item.source, partial, 0o755)
        except (adbutils.AdbError, OSError):
            if device.get_state() == "device" and _free(device) < item.size:
                raise _no_space(device) from None
            raise
        check_sent(item, _hashes(device, [partial]).get(partial, ""))
        say(device, shlex.join(["mv", partial, path]))


def _hashes(device: adbutils.AdbDevice, paths: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of files that are there, computed there."""
    said = say(device, f"sha256sum {shlex.join(paths)} 2>/dev/null")
    return {path: sha256 for sha256, path in re.findall(r"^([0-9a-f]{64})  (.+?)\r?$", said, re.M)}


def _free(device: adbutils.AdbDevice) -> int:
    """Bytes."""
    return int(say(device, f"df -P -k {ROOT}").splitlines()[-1].split()[3]) * 1024


def _no_space(device: adbutils.AdbDevice, detail: str = "") -> DeviceError:
    return DeviceError(
        f"there is no space left on the device{detail}",
        where=f"adb:{device.serial}: {ROOT}",
        do="free some on the device",
    )


def say(device: adbutils.AdbDevice, command: str) -> str:
    """What a command says on the device, errors too. adbutils raises if that does not come to its end."""
    return str(device.shell2(command.strip(), timeout=None, v2=True).output)


@contextmanager
def lost(name: str) -> Iterator[None]:
    """What adbutils raises when a device goes, as an error of ours."""
    try:
        yield
    except Exception as e:
        torn = ConnectionError, EOFError, AssertionError, struct.error  # adbutils asserts what it unpacks
        if not _passed_adbutils(e) or not (isinstance(e, torn) or type(e).__module__.startswith("adbutils.")):
            raise
        said = str(e.args[0]).partition("\n")[0] if e.args else type(e).__name__
        raise DeviceError(
            f"the device was lost, or adb cannot reach it: {said}",
            where=name,
            do="look at `adb devices`; nothing of this profile was kept, and files that it has got are not sent again",
        ) from None


def _passed_adbutils(error: Exception) -> bool:
    """Whether it was raised there, or in what was called from there."""
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] == "adbutils" for module in modules)
