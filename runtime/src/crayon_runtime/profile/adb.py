"""Profiling on a phone that is reached by adb: `--target adb:SERIAL`.

There is no Python there, so `crayon-bench` measures, for the program of ExecuTorch alone; what it does not measure is absent from the profile.
Its files and the model's lie in /data/local/tmp/crayon-edge, in folders with names of their content, and are sent again only where the
phone finds another hash. A shell that holds the lock ends what runs and clears up when its connection ends.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import adapter_bundle
from crayon_runtime.errors import BackendError, DeviceError, MissingExtra
from crayon_runtime.profile import bench
from crayon_runtime.profile.describe import header_of, processor_name, total_memory
from crayon_runtime.profile.jobs import Describe, Job, Load, Long, Measure, Trace
from crayon_runtime.profile.measure import Phase
from crayon_runtime.profile.push import Item, check_sent, check_served, total
from crayon_runtime.profile.records import Absent, Record, Sample
from crayon_runtime.profile.sensors import Sensors
from crayon_runtime.profile.target import Asked, OnStep

if TYPE_CHECKING:
    import adbutils

ROOT = "/data/local/tmp/crayon-edge"
OLDEST = 26
"""The oldest Android, by its API level: Android 8."""

_ABIS = {"arm64-v8a": "aarch64", "x86_64": "x86_64"}

# The lock is the shell's, and ends with it. What the connection's end leaves running is ended, whatever ended the connection.
_HOLD = f"""
mkdir -p {ROOT} && cd {ROOT} || exit; exec 9>lock; flock -n 9 || {{ echo taken; exit; }}
trap '' HUP; rm -rf run; mkdir run; echo held; read end; kill $(cat run/pid) 2>/dev/null; rm -rf run
"""

_FACTS = """
for p in build.version.sdk product.cpu.abi product.manufacturer product.model; do echo $(getprop ro.$p 2>/dev/null); done
uname -s -r -m; uname -m
"""

_LOOK = " ".join(
    [
        "/proc/cpuinfo /proc/meminfo /proc/device-tree/model /sys/devices/system/cpu/cpu*/cpu_capacity",
        "/sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq",
        "/sys/class/thermal/thermal_zone*/t* /sys/class/thermal/cooling_device*/type /sys/class/thermal/cooling_device*/cur_state",
        "/sys/class/hwmon/hwmon*/name /sys/class/hwmon/hwmon*/temp*_* /sys/class/hwmon/hwmon*/power*_input",
        "/sys/class/hwmon/hwmon*/energy*_input /sys/class/power_supply/*/type /sys/class/power_supply/*/status",
        "/sys/class/power_supply/*/*_now",
    ]
)
"""What `Sensors` and the header look at."""


class Adb:
    """A phone, or another device with adbd.

    Args:
        serial: as `adb devices` lists it; None: the only one that is connected.
        bench: see `crayon_runtime.profile.bench.files`.
    """

    def __init__(self, serial: str | None = None, *, bench: Path | None = None) -> None:
        self.name = f"adb:{serial or ''}"
        self._serial = serial
        self._bench = bench
        self._held: _Held | None = None

    @contextmanager
    def hold(self, asked: Asked, on_step: OnStep) -> Iterator[Asked]:
        bundle = Bundle.open(asked.bundle)
        check_served(bundle, "executorch")
        check_served(bundle, asked.backend)
        if asked.backend == "onnx":
            raise BackendError(
                f"on a phone {bench.NAME} measures, which runs programs of ExecuTorch only",
                where=bundle.path,
                do="use --backend executorch; the app has a benchmark for ONNX Runtime",
            )
        adapter = adapter_bundle(bundle, asked.adapter) if asked.adapter is not None else None
        program, adapted = _program_items(bundle), _adapter_items(adapter) if adapter else []
        on_step(f"connecting to {self.name}")
        with _lost(self.name):
            device = _device(self._serial)
            self.name = f"adb:{device.serial}"
            phone = _Phone.of(device)
            with bench.files(phone.machine, self._bench) as files, _locked(device, self.name):
                groups = [_Group.of(items) for items in (files.items, program, adapted) if items]
                _send(device, groups, on_step)
                with TemporaryDirectory() as mirror:
                    self._held = _Held(
                        device, phone, bundle, adapter, files.command(groups[0].folder), groups, Path(mirror)
                    )
                    yield Asked(groups[1].folder, "executorch", None if adapter is None else groups[2].folder)

    def run(self, job: Job) -> Iterator[bytes]:
        assert self._held is not None, "the device is not held"
        with _lost(self.name):
            for record in self._held.work(job):
                yield msgspec.json.encode(record)


class _Phone(NamedTuple):
    machine: str
    system: str
    model: str
    """Empty where there are no properties, as on another Linux."""

    @classmethod
    def of(cls, device: adbutils.AdbDevice) -> _Phone:
        """What there is; DeviceError if it is too old, or of a kind that nothing was built for."""
        sdk, abi, maker, model, system, machine = (line.strip() for line in _say(device, _FACTS).splitlines())
        if sdk and int(sdk) < OLDEST:
            raise DeviceError(
                f"the phone's Android is too old: its API level is {sdk}, and {OLDEST} (Android 8) is needed",
                where=device.serial,
                do="use another phone",
            )
        return cls(_ABIS.get(abi, abi or machine), system, f"{maker} {model}".strip())


class _Group(NamedTuple):
    """Files that lie together on the device."""

    folder: str
    items: list[Item]

    @classmethod
    def of(cls, items: list[Item]) -> _Group:
        names = "".join(f"{item.sha256} {item.path}\n" for item in items)
        return cls(f"{ROOT}/{hashlib.sha256(names.encode()).hexdigest()[:16]}", items)


class _Held(NamedTuple):
    """A phone with everything on it."""

    device: adbutils.AdbDevice
    phone: _Phone
    bundle: Bundle
    adapter: Bundle | None
    command: list[str]
    groups: list[_Group]
    mirror: Path
    """Of the files that sensors are read from, with what was in them when they were last looked at."""

    def work(self, job: Job) -> Iterator[Record]:
        match job.work:
            case Describe():
                sensors = self._look()
                yield header_of(
                    self.bundle,
                    versions={},
                    system=self.phone.system,
                    cpu_info=self.phone.model or processor_name(self.mirror, self.phone.machine),
                    cores=sensors.cores(),
                    memory_bytes=total_memory(self.mirror),
                    context_length=self.bundle.model.context_length,
                    backends=job.backend,
                    adapter=self.adapter.manifest.name if self.adapter else None,
                )
                yield from sensors.absent()
            case Load(first=True):
                yield Absent(what="load_first", reason=f"{bench.NAME} checks no hashes")
            case Load():
                row, *_ = self._measured(job, prompts=[0], depths=[0], generate=1, rounds=1, more=["--cold"])
                yield bench.cold(row)
            case Measure() as asked:
                began = perf_counter_ns()
                yield self._sample(job, "started", began, None)
                rows = self._measured(
                    job, prompts=asked.prompts, depths=asked.depths, generate=asked.generate, rounds=asked.rounds
                )
                yield from bench.observations(rows, self.adapter.manifest.name if self.adapter else None)
                yield self._sample(job, "end", began, rows[-1])
            case Trace():
                yield Absent(what="operators", reason=f"{bench.NAME} traces none")
            case Long():
                yield Absent(what="throttling, heat and energy of a long run", reason=f"{bench.NAME} has no long run")

    def _measured(
        self,
        job: Job,
        *,
        prompts: Sequence[int],
        depths: Sequence[int],
        generate: int,
        rounds: int,
        more: Sequence[str] = (),
    ) -> list[bench.Row]:
        """Run it, and fetch what it wrote."""
        folder, items = self.groups[1]
        program, *data = [f"{folder}/{item.path}" for item in items]
        command = [*self.command, "--program", program]
        for path in data:
            command += ["--data", path]
        if job.adapter is not None:
            command += ["--adapter", job.adapter]
        if job.threads is not None:
            command += ["--threads", str(job.threads)]
        if job.cpus is not None:
            command = ["taskset", f"{sum(1 << cpu for cpu in job.cpus):x}", *command]
        command += ["--prompt", _commas(prompts), "--position", _commas(depths), "--decode", str(generate)]
        command += ["--repeat", str(rounds), *more]
        warm = "" if "--cold" in more else f"cat {shlex.join([program, *data])} >/dev/null; "
        start = f"""sh -c 'echo $$ >pid; exec "$@" >out.json 2>said' - {shlex.join(command)}"""
        done = self.device.shell2(f"cd {ROOT}/run && {warm}{start}", timeout=None)
        if done.returncode:
            said = _say(self.device, f"cat {ROOT}/run/said").strip()
            raise BackendError(
                f"{bench.NAME} ended with code {done.returncode} on the device{f': {said[-2000:]}' if said else ''}",
                where=self.device.serial,
                do="look for want of memory with `adb shell dmesg`" if done.returncode == 137 else None,
            )
        return bench.rows(self.device.sync.read_bytes(f"{ROOT}/run/out.json"))

    def _look(self) -> Sensors:
        """Copy what the system says now."""
        look = f'for f in {_LOOK}; do [ -f "$f" ] && echo "@@$f" && cat "$f" 2>/dev/null && echo; done'
        for part in _say(self.device, look).replace("\r", "").split("@@/")[1:]:
            name, _, content = part.partition("\n")
            path = self.mirror / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        cpuinfo = self.mirror / "proc/cpuinfo"
        cpus = re.findall(r"^processor\s*: (\d+)", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
        return Sensors(map(int, cpus), self.mirror)

    def _sample(self, job: Job, phase: Phase, began: int, row: bench.Row | None) -> Sample:
        sensors = self._look()
        return Sample(
            process=job.process,
            phase=phase,
            t_ns=perf_counter_ns() - began,
            rss_bytes=None if row is None else row.rss_bytes,
            pss_bytes=None if row is None else row.pss_bytes,
            mapped_bytes=None,
            peak_rss_bytes=None if row is None else row.max_rss_kb * 1024,
            frequency_hz=sensors.frequency(),
            temperature_c=sensors.temperature(),
            throttled=sensors.throttled(),
            energy_j=sensors.energy(),
            power_w=sensors.power(),
        )


def _program_items(bundle: Bundle) -> list[Item]:
    """The program, and its weights."""
    variant = bundle.model.variants.executorch
    assert variant is not UNSET
    listed = {file.path: file for file in bundle.manifest.files}
    names = [variant.program, *variant.data]
    return [Item(name, bundle.path / name, listed[name].sha256, listed[name].size) for name in names]


def _adapter_items(adapter: Bundle) -> list[Item]:
    """An adapter's, with the names that crayon-bench knows."""
    variant = adapter.as_adapter.variants.executorch
    if variant is UNSET or variant.program is None:
        raise BackendError(
            f"the adapter {adapter.manifest.name} has no program of ExecuTorch, which {bench.NAME} runs",
            where=adapter.path,
            do="convert it again with `crayon adapter convert`, or measure without --adapter",
        )
    names = {"adapter.pte": variant.program, "adapter.ptd": variant.data[0]}
    return [Item.of(name, adapter.path / path) for name, path in names.items()]


def _device(serial: str | None) -> adbutils.AdbDevice:
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
def _locked(device: adbutils.AdbDevice, name: str) -> Iterator[None]:
    """Hold the device's lock, and a folder for what runs."""
    import adbutils

    with device.shell(_HOLD.strip(), stream=True, timeout=None) as held:
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


def _send(device: adbutils.AdbDevice, groups: Sequence[_Group], on_step: OnStep) -> None:
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
        _say(device, f"cd {ROOT} && for d in ????????????????; do case $d in {kept}) ;; *) rm -rf $d;; esac; done")
        if (free := _free(device)) < needed:
            raise _no_space(device, f": {needed / 1e6:.1f} MB are needed, and {free / 1e6:.1f} MB free")
    on_step(f"sending {len(missing)} of {len(wanted)} files, {needed / 1e6:.1f} MB")
    import adbutils

    for path, item in missing.items():
        _say(device, shlex.join(["mkdir", "-p", path.rpartition("/")[0]]))
        partial = f"{ROOT}/run/partial"
        try:
            device.sync.push(item.source, partial, 0o755)
        except (adbutils.AdbError, OSError):
            if device.get_state() == "device" and _free(device) < item.size:
                raise _no_space(device) from None
            raise
        check_sent(item, _hashes(device, [partial]).get(partial, ""))
        _say(device, shlex.join(["mv", partial, path]))


def _hashes(device: adbutils.AdbDevice, paths: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of files that are there, computed there."""
    said = _say(device, f"sha256sum {shlex.join(paths)} 2>/dev/null")
    return {path: sha256 for sha256, path in re.findall(r"^([0-9a-f]{64})  (.+?)\r?$", said, re.M)}


def _free(device: adbutils.AdbDevice) -> int:
    """Bytes."""
    return int(_say(device, f"df -P -k {ROOT}").splitlines()[-1].split()[3]) * 1024


def _no_space(device: adbutils.AdbDevice, detail: str = "") -> DeviceError:
    return DeviceError(
        f"there is no space left on the device{detail}",
        where=f"adb:{device.serial}: {ROOT}",
        do="free some on the device",
    )


def _say(device: adbutils.AdbDevice, command: str) -> str:
    """What a command says on the device, errors too. adbutils raises if that does not come to its end."""
    return str(device.shell2(command.strip(), timeout=None).output)


@contextmanager
def _lost(name: str) -> Iterator[None]:
    """What adbutils raises when a device goes, as an error of ours."""
    try:
        yield
    except Exception as e:
        module = type(e).__module__.partition(".")[0]
        torn = ConnectionError, EOFError, AssertionError, struct.error  # adbutils asserts what it unpacks
        if module != "adbutils" and not isinstance(e, torn):
            raise
        said = str(e.args[0]).partition("\n")[0] if e.args else type(e).__name__
        raise DeviceError(
            f"the device was lost, or adb cannot reach it: {said}",
            where=name,
            do="look at `adb devices`; nothing of this profile was kept, and files that it has got are not sent again",
        ) from None


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
