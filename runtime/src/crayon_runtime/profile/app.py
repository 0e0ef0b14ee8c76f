"""Profiling on a phone in the app of `android_harness`, by adb: `--target adb:SERIAL --app`.

What measures is the app's own runtime, in Kotlin, with both backends; it does the jobs of `crayon profile` and writes their records to a file,
which is fetched. The bundle lies in /data/local/tmp/crayon-edge, where apps may read. Each job is done by a new process of the app.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import BackendError, DeviceError
from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.phone import Group, Phone, find, locked, lost, say, send
from crayon_runtime.profile.push import adapter_outside, check_served, items_of
from crayon_runtime.profile.target import Asked, OnStep

if TYPE_CHECKING:
    import adbutils

PACKAGE = "crayon.app"
RESULTS = f"/sdcard/Android/data/{PACKAGE}/files/benchmarks"
"""Where the app writes, and adb's shell reads."""

_MARK = "crayon-profile-"
"""How the names of results begin that nobody but a profile wants."""

GONE = 5
"""Seconds that the app may be without a process before its job is given up: it takes a moment to start."""

_START = f"am start -S -n {PACKAGE}/.benchmark.HeadlessBenchmarkActivity --activity-no-animation"

_END = f"{{ am force-stop {PACKAGE}; rm -f {RESULTS}/{_MARK}*; }}"

# The file appears when everything is in it.
_WAIT = f"""
gone=0; while [ ! -e {{file}} ]; do
  if pidof {PACKAGE} >/dev/null; then gone=0; else gone=$((gone + 1)); fi
  [ $gone -lt {GONE} ] || exit 1; sleep 1
done
"""


class App:
    """The app on a phone.

    Args:
        serial: as `adb devices` lists it; None: the only one that is connected.
    """

    def __init__(self, serial: str | None = None) -> None:
        self.name = f"adb:{serial or ''}"
        self._serial = serial
        self._device: adbutils.AdbDevice | None = None

    @contextmanager
    def hold(self, asked: Asked, on_step: OnStep) -> Iterator[Asked]:
        bundle = Bundle.open(asked.bundle)
        check_served(bundle, asked.backend)
        adapter = adapter_outside(bundle, asked.adapter)
        on_step(f"connecting to {self.name}")
        with lost(self.name):
            device = find(self._serial)
            self.name = f"adb:{device.serial}"
            Phone.of(device)
            with locked(device, self.name, end=_END):
                if PACKAGE not in say(device, f"pm path {PACKAGE}"):
                    raise DeviceError(
                        f"the app {PACKAGE} is not on the phone",
                        where=self.name,
                        do="install it from android_harness, or measure with crayon-bench, without --app",
                    )
                model = Group.of(items_of(bundle, bundle.path.name))
                groups = [model, *([Group.of(items_of(adapter, adapter.path.name))] if adapter else [])]
                send(device, groups, on_step)
                self._device = device
                try:
                    yield Asked(
                        bundle=f"{model.folder}/{bundle.path.name}",
                        backend=asked.backend,
                        adapter=f"{groups[1].folder}/{adapter.path.name}" if adapter else asked.adapter,
                    )
                finally:
                    self._device = None

    def run(self, job: Job) -> Iterator[bytes]:
        device = self._device
        assert device is not None, "the device is not held"
        name = f"{_MARK}{secrets.token_hex(8)}.jsonl"
        extras = ["--es", "name", name, "--es", "bundle", job.bundle, "--es", "job", msgspec.json.encode(job).decode()]
        with lost(self.name):
            said = say(device, f"{_START} {shlex.join(extras)}").strip()
            if "Error" in said or "Exception" in said:  # `am` ends with 0 in any case
                raise DeviceError(
                    f"the app's benchmark cannot be started: {said[-2000:]}",
                    where=self.name,
                    do=f"install the {PACKAGE} of this version, and start it once by hand",
                )
            file = f"{RESULTS}/{name}"
            done = device.shell2(_WAIT.format(file=file).strip(), timeout=None, v2=True)
            if done.returncode:
                raise BackendError(
                    "the app ended before it had measured",
                    where=self.name,
                    do="look for want of memory, or for a crash: `adb logcat -s crayon AndroidRuntime lowmemorykiller`",
                )
            content = device.sync.read_bytes(file)
            say(device, f"rm -f {file}")
        yield from content.splitlines()
