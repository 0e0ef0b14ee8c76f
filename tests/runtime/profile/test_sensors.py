from __future__ import annotations

from pathlib import Path

import pytest

from crayon_runtime.profile.records import Core
from crayon_runtime.profile.sensors import Sensors, clusters


def system(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


BOARD = {
    **{f"devices/system/cpu/cpu{cpu}/cpu_capacity": 400 if cpu < 2 else 1024 for cpu in range(4)},
    **{f"devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq": 1_800_000 for cpu in range(4)},
    **{f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq": 600_000 + cpu for cpu in range(4)},
    "class/thermal/thermal_zone0/temp": 51234,
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/hwmon/hwmon0/temp1_input": 40000,
    "class/hwmon/hwmon0/name": "nvme",
    "class/hwmon/hwmon0/power1_input": 2_500_000,
    "class/thermal/cooling_device0/cur_state": 1,
    "devices/platform/soc/soc:firmware/get_throttled": "50000",
    "class/power_supply/BAT0/type": "Battery",
    "class/power_supply/BAT0/status": "Discharging",
    "class/power_supply/BAT0/current_now": 500_000,
    "class/power_supply/BAT0/voltage_now": 4_000_000,
    "class/power_supply/AC/type": "Mains",
    "class/powercap/intel-rapl:0/energy_uj": 9_000_000,
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/max_energy_range_uj": 10_000_000,
    "class/powercap/intel-rapl:0:0/energy_uj": 5_000_000,
}


def test_a_board_that_tells_everything(tmp_path: Path) -> None:
    sensors = Sensors(range(4), system(tmp_path, BOARD))
    assert sensors.cores()[0] == Core(0, 400, 1_800_000_000)
    assert clusters(sensors.cores()) == [[2, 3], [0, 1]]
    assert sensors.frequency() == [600_000_000, 600_001_000, 600_002_000, 600_003_000]
    assert sensors.temperature() == {"cpu-thermal thermal_zone0 temp": 51.234, "nvme hwmon0 temp1": 40.0}
    assert set(sensors.throttled().values()) == {1, 0x50000}
    assert sensors.power() == {"nvme hwmon0 power1": 2.5, "Battery BAT0 current_now": 2.0}
    assert sensors.absent() == []


def test_an_energy_counter_that_begins_again_is_followed(tmp_path: Path) -> None:
    sensors = Sensors(range(4), system(tmp_path, BOARD))
    (before,) = sensors.energy().values()  # the part of the package is not counted again
    system(tmp_path, {"class/powercap/intel-rapl:0/energy_uj": 1_000_000})
    (after,) = sensors.energy().values()
    assert after - before == pytest.approx(2.0)


def test_a_charging_battery_is_no_sensor(tmp_path: Path) -> None:
    sensors = Sensors([0], system(tmp_path, BOARD | {"class/power_supply/BAT0/status": "Charging"}))
    assert list(sensors.power()) == ["nvme hwmon0 power1"]


def test_a_system_that_tells_nothing_says_why(tmp_path: Path) -> None:
    sensors = Sensors([0, 1], tmp_path)
    assert sensors.cores() == [Core(0, None, None), Core(1, None, None)]
    assert clusters(sensors.cores()) == [[0, 1]]
    absent = {a.what: a.reason for a in sensors.absent()}
    assert set(absent) == {"CPU frequency", "temperature", "throttling", "energy"}
    assert "/sys/class/powercap" in absent["energy"]
    assert (sensors.frequency(), sensors.temperature(), sensors.energy(), sensors.power()) == ([], {}, {}, {})


def test_a_sensor_that_cannot_be_read(tmp_path: Path) -> None:
    sensors = Sensors([0], system(tmp_path, {"class/thermal/thermal_zone0/temp": "not a number"}))
    assert {a.what: a.reason for a in sensors.absent()}[
        "temperature"
    ] == "thermal_zone0 temp cannot be read by this user"
