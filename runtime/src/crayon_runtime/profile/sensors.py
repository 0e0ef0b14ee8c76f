"""What Linux tells of a machine while it computes: clocks, temperatures, throttling, energy. What it does not tell is absent, with a reason."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from crayon_runtime.profile.records import Absent, Core

_CPUS = "sys/devices/system/cpu"


class Sensors:
    """The sensors of a machine.

    Args:
        cpus: the cores that are of interest.
        root: of the file system that has /sys and /proc.
    """

    def __init__(self, cpus: Iterable[int], root: Path = Path("/")) -> None:
        self._root = root
        self._cpus = sorted(cpus)
        self._zones = self._found("sys/class/thermal/thermal_zone*/temp") + self._found(
            "sys/class/hwmon/hwmon*/temp*_input"
        )
        self._frequencies = [path for cpu in self._cpus if (path := self._frequency(cpu)).exists()]
        self._counters = [
            *(path for path in self._found(f"{_CPUS}/cpu*/thermal_throttle/*_throttle_count")),
            *self._found("sys/class/thermal/cooling_device*/cur_state"),
            *self._found("sys/devices/platform/soc/soc:firmware/get_throttled"),
        ]
        # Of RAPL the packages: their parts are within them.
        packages = self._found("sys/class/powercap/*rapl*:*/energy_uj")
        self._energies = [p for p in packages if p.parent.name.count(":") == 1] + self._found(
            "sys/class/hwmon/hwmon*/energy*_input"
        )
        self._powers = self._found("sys/class/hwmon/hwmon*/power*_input") + self._batteries()
        self._wraps: dict[str, tuple[float, float]] = {}

    def cores(self) -> list[Core]:
        """Those of interest."""
        return [
            Core(
                cpu,
                _number(self._root / f"{_CPUS}/cpu{cpu}/cpu_capacity"),
                (khz := _number(self._root / f"{_CPUS}/cpu{cpu}/cpufreq/cpuinfo_max_freq")) and khz * 1000,
            )
            for cpu in self._cpus
        ]

    def frequency(self) -> list[int]:
        """Hertz of each core that says it."""
        return [khz * 1000 for path in self._frequencies if (khz := _number(path)) is not None]

    def temperature(self) -> dict[str, float]:
        """Degrees Celsius, by zone."""
        return {self._name(path): milli / 1000 for path in self._zones if (milli := _number(path)) is not None}

    def throttled(self) -> dict[str, int]:
        """Counters and states that change when the system slows down."""
        return {self._name(path): value for path in self._counters if (value := _number(path)) is not None}

    def energy(self) -> dict[str, float]:
        """Joules since some moment, by counter; one that begins again at 0 is followed."""
        found = {}
        for path in self._energies:
            if (micro := _number(path)) is None:
                continue
            name, value = self._name(path), micro / 1e6
            before, added = self._wraps.get(name, (value, 0.0))
            if value < before:
                added += (_number(path.with_name("max_energy_range_uj")) or 0) / 1e6
            self._wraps[name] = value, added
            found[name] = value + added
        return found

    def power(self) -> dict[str, float]:
        """Watts at this moment, by sensor."""
        found = {}
        for path in self._powers:
            watts = _number(path)
            if path.name == "current_now":
                volts = _number(path.with_name("voltage_now"))
                watts = None if watts is None or volts is None else watts * volts // 10**6
            if watts is not None:
                found[self._name(path)] = abs(watts) / 1e6
        return found

    def absent(self) -> list[Absent]:
        """What the system does not tell now, with the reason."""
        return [
            Absent(what=what, reason=self._reason(place, paths))
            for what, place, paths, values in (
                ("CPU frequency", f"/{_CPUS}/cpu*/cpufreq/scaling_cur_freq", self._frequencies, self.frequency()),
                ("temperature", "/sys/class/thermal and /sys/class/hwmon", self._zones, self.temperature()),
                ("throttling", f"/{_CPUS}/cpu*/thermal_throttle and cooling devices", self._counters, self.throttled()),
                (
                    "energy",
                    "/sys/class/powercap (RAPL), /sys/class/hwmon and /sys/class/power_supply",
                    self._energies + self._powers,
                    {**self.energy(), **self.power()},
                ),
            )
            if not values
        ]

    def _frequency(self, cpu: int) -> Path:
        return self._root / f"{_CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq"

    def _batteries(self) -> list[Path]:
        """What discharging batteries give: their power, or their current beside a voltage."""
        found = []
        for supply in sorted((self._root / "sys/class/power_supply").glob("*")):
            if _text(supply / "type") == "Battery" and _text(supply / "status") == "Discharging":
                files = [supply / name for name in ("power_now", "current_now")]
                found += [path for path in files if path.exists()][:1]
        return found

    def _found(self, pattern: str) -> list[Path]:
        return sorted(self._root.glob(pattern))

    def _name(self, path: Path) -> str:
        """The kind of the sensor, where it says one, and its place."""
        stem = path.name.removesuffix("_input")
        kind = _text(path.parent / "type") or _text(path.parent / "name")
        label = _text(path.with_name(f"{stem}_label"))
        return " ".join(part for part in (kind, label, path.parent.name, stem) if part)

    def _reason(self, place: str, paths: list[Path]) -> str:
        return f"{self._name(paths[0])} cannot be read by this user" if paths else f"the system has nothing in {place}"


def clusters(cores: Iterable[Core]) -> list[list[int]]:
    """Cores of one speed each, the fastest first: of a big.LITTLE processor several, otherwise one."""
    by_speed: dict[float, list[int]] = defaultdict(list)
    for core in cores:
        speed = core.capacity if core.capacity is not None else core.max_hz
        by_speed[-math.inf if speed is None else speed].append(core.cpu)
    return [by_speed[speed] for speed in sorted(by_speed, reverse=True)]


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text, 16 if path.name == "get_throttled" else 10)
    except ValueError:
        return None
