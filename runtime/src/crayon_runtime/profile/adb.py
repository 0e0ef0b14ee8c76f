"""Profiling on a phone that is reached by adb: `--target adb:SERIAL`.

There is no Python there, so `crayon-bench` measures, for the program of ExecuTorch alone; what it does not measure is absent from the profile.
Its files and the model's lie in /data/local/tmp/crayon-edge, in folders with names of their content, and are sent again only where the
phone finds another hash. A shell that holds the lock ends what runs and clears up when its connection ends.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import adapter_bundle
from crayon_runtime.errors import BackendError
from crayon_runtime.profile import bench
from crayon_runtime.profile.describe import header_of, processor_name, total_memory
from crayon_runtime.profile.jobs import Describe, Job, Load, Long, Measure, Trace
from crayon_runtime.profile.measure import Phase
from crayon_runtime.profile.phone import ROOT, Group, Phone, find, locked, lost, say, send
from crayon_runtime.profile.push import Item, check_served
from crayon_runtime.profile.records import Absent, Record, Sample
from crayon_runtime.profile.sensors import Sensors
from crayon_runtime.profile.target import Asked, OnStep

if TYPE_CHECKING:
    import adbutils

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
                do="use --backend executorch, or measure in the app, which runs ONNX Runtime too, with --app",
            )
        adapter = adapter_bundle(bundle, asked.adapter) if asked.adapter is not None else None
        program, adapted = _program_items(bundle), _adapter_items(adapter) if adapter else []
        on_step(f"connecting to {self.name}")
        with lost(self.name):
            device = find(self._serial)
            self.name = f"adb:{device.serial}"
            phone = Phone.of(device)
            with bench.files(phone.machine, self._bench) as files, locked(device, self.name, end="kill $(cat run/pid)"):
                groups = [Group.of(items) for items in (files.items, program, adapted) if items]
                send(device, groups, on_step)
                with TemporaryDirectory() as mirror:
                    self._held = _Held(
                        device, phone, bundle, adapter, files.command(groups[0].folder), groups, Path(mirror)
                    )
                    try:
                        yield Asked(groups[1].folder, "executorch", None if adapter is None else groups[2].folder)
                    finally:
                        self._held = None

    def run(self, job: Job) -> Iterator[bytes]:
        assert self._held is not None, "the device is not held"
        with lost(self.name):
            for record in self._held.work(job):
                yield msgspec.json.encode(record)


class _Held(NamedTuple):
    """A phone with everything on it."""

    device: adbutils.AdbDevice
    phone: Phone
    bundle: Bundle
    adapter: Bundle | None
    command: list[str]
    groups: list[Group]
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
        done = self.device.shell2(f"cd {ROOT}/run && {warm}{start}", timeout=None, v2=True)
        if done.returncode:
            said = say(self.device, f"cat {ROOT}/run/said").strip()
            raise BackendError(
                f"{bench.NAME} ended with code {done.returncode} on the device{f': {said[-2000:]}' if said else ''}",
                where=self.device.serial,
                do="look for want of memory with `adb shell dmesg`" if done.returncode == 137 else None,
            )
        return bench.rows(self.device.sync.read_bytes(f"{ROOT}/run/out.json"))

    def _look(self) -> Sensors:
        """Copy what the system says now."""
        look = f'for f in {_LOOK}; do [ -f "$f" ] && echo "@@$f" && cat "$f" 2>/dev/null && echo; done'
        for part in say(self.device, look).replace("\r", "").split("@@/")[1:]:
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


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
