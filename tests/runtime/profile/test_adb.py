"""Profiling over adb, by Android's own adbd and the crayon-bench that was built: what is sent, what is left, what is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.profile import profile as command
from crayon_runtime.errors import AdapterError, BackendError, DeviceError
from crayon_runtime.profile import Profile
from crayon_runtime.profile import phone as phone_module
from crayon_runtime.profile.adb import Adb
from crayon_runtime.profile.jobs import Load, Measure
from crayon_runtime.profile.phone import ROOT
from crayon_runtime.profile.records import Absent, Observation
from crayon_runtime.profile.target import results
from tests.programs import exported
from tests.runtime import bundles
from tests.runtime.phones import Phone, asked, connected, job, own_server, scripted_server
from tests.support import needs

LONG = Measure(prompts=[8], depths=[0], generate=64, rounds=1_000_000, more=False)
SHORT = Measure(prompts=[8], depths=[0, 4], generate=3, rounds=2, more=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    with connected(tmp_path_factory.mktemp("phone")) as phone:
        yield phone


@pytest.fixture
def phone(network: Phone) -> Phone:
    """One that is on, with nothing of ours on it."""
    network.shell(f"rm -rf {ROOT}")
    return network


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported().path


def hold(target: Adb, bundle: Path, **others: Any) -> list[str]:
    """Hold a device and let it go; what was done."""
    steps: list[str] = []
    with target.hold(asked(bundle, **others), steps.append):
        pass
    return steps


def assert_nothing_runs(phone: Phone, *, within: float = 0.0) -> None:
    """And nothing is left but files for the next profile, whose names are those of their content."""
    until = time.monotonic() + within
    while (left := phone.shell(f"pgrep crayon-bench; ls -d {ROOT}/run 2>/dev/null")) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == ""


@pytest.mark.slow
def test_a_phone_is_profiled(phone: Phone, bundle: Path, tmp_path: Path) -> None:
    sizes = ["--prompt", "4,9", "--depth", "0,8", "--generate", "4", "--repetitions", "2", "--threads", "1"]
    options = [str(bundle), "--target", f"adb:{phone.serial}", *sizes, "--json", "--out"]
    result = CliRunner(catch_exceptions=False).invoke(command, [*options, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    made = Profile.read(tmp_path / "out")
    assert made.header.target == f"adb:{phone.serial}"
    assert (made.header.backends, made.header.model_filename) == ("executorch", bundle.name)
    assert made.header.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert len(made.header.cores) == os.cpu_count()
    tests = {test.label.partition(",")[0]: test for test in made.tests}
    assert set(tests) >= {"pp4", "pp9", "tg4", "tg4 @ d8", "load_warm", "first_token"}
    decode = tests["tg4 @ d8"]
    assert [len(tokens) for tokens in decode.token_ns] == [4] * 6
    assert decode.processes == [0, 0, 0, 1, 1, 1]
    assert all(0 < sum(tokens) <= sample for tokens, sample in zip(decode.token_ns, decode.samples_ns, strict=True))
    assert len(decode.warmup_ns) == 2
    assert {sample.phase for sample in made.samples} == {"started", "end"}
    assert all(sample.pss_bytes for sample in made.samples if sample.phase == "end")
    assert {"TTFT", "operators", "load_first", "adapter swap"} <= {absent.what for absent in made.absent}
    assert_nothing_runs(phone)


def test_the_only_device_and_an_adapter(phone: Phone, bundle: Path) -> None:
    target = Adb()
    with target.hold(asked(bundle, adapter="alice"), lambda _: None) as held:
        assert target.name == f"adb:{phone.serial}"
        found = list(results(target, job(held, SHORT, cpus=[0])))
        seen = [(o.test, o.n_depth, o.adapter, len(o.samples_ns)) for o in found if isinstance(o, Observation)]
        assert seen == [
            ("load_warm", 0, None, 1), ("first_token", 0, None, 1),
            ("prefill", 0, "alice", 2), ("decode", 0, "alice", 2), ("decode", 4, "alice", 2),
        ]  # fmt: skip
        (cold,) = results(target, job(held, Load(first=False)))
        assert isinstance(cold, Absent)  # its files are on a file system in memory
        assert "in its page cache" in cold.reason
        with pytest.raises(BackendError, match="crayon-bench ended with code 1 on the device: crayon-bench: "):
            list(results(target, job(held._replace(adapter="/none"), SHORT)))
    assert_nothing_runs(phone)


def test_only_what_is_missing_is_sent_and_a_name_is_not_believed(phone: Phone, bundle: Path) -> None:
    target = Adb(phone.serial)
    assert any("sending" in step for step in hold(target, bundle))
    assert not any("sending" in step for step in hold(target, bundle))
    phone.shell(f"printf x | dd of=$(ls {ROOT}/*/model.ptd) conv=notrunc 2>/dev/null")
    assert any("sending 1 of " in step for step in hold(target, bundle))
    (there,) = phone.shell(f"sha256sum {ROOT}/*/model.ptd").split()[:1]
    assert there == next(file.sha256 for file in Bundle.open(bundle).manifest.files if file.path == "model.ptd")


def test_two_profiles_at_once(phone: Phone, bundle: Path) -> None:
    with Adb(phone.serial).hold(asked(bundle), lambda _: None):  # noqa: SIM117
        with pytest.raises(BackendError, match="another profile is being made on this device"):
            hold(Adb(phone.serial), bundle)
    hold(Adb(phone.serial), bundle)


_INTERRUPTED = """
import sys
from importlib.metadata import EntryPoint
from crayon_runtime import cli
verb = EntryPoint("profile", "crayon_runtime.cli.profile:profile", cli.GROUP)
sizes = ["--prompt", "8", "--depth", "0", "--generate", "4000"]
sys.exit(cli.main(["profile", *sys.argv[1:], "--out", "out", *sizes], verbs=[verb]))
"""


@pytest.mark.parametrize("by, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_ctrl_c_or_a_sudden_end_leaves_nothing(
    phone: Phone, bundle: Path, tmp_path: Path, by: signal.Signals, code: int
) -> None:
    arguments = [sys.executable, "-c", _INTERRUPTED, str(bundle), "--target", f"adb:{phone.serial}"]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as crayon:
        while not phone.shell("pgrep crayon-bench"):
            assert crayon.poll() is None, crayon.stderr and crayon.stderr.read()
        crayon.send_signal(by)
        crayon.communicate()
    assert crayon.returncode == code
    assert not (tmp_path / "out").exists()
    assert_nothing_runs(phone, within=10)


def test_a_device_without_space(network: Phone, bundle: Path) -> None:
    network.unplug()
    network.start(size="15m")
    network.shell(f"mkdir -p {ROOT}/0123456789abcdef; head -c 4000000 /dev/zero >{ROOT}/0123456789abcdef/old")
    try:
        with pytest.raises(
            DeviceError, match=r"no space left on the device: 1\d\.\d MB are needed, and 1\d\.\d MB free"
        ):
            hold(Adb(network.serial), bundle)
        assert network.shell(f"ls {ROOT}") == "lock"  # what no profile needs made room
    finally:
        network.unplug()
        network.start()


def test_storage_that_fills_while_files_arrive(network: Phone, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, really = iter([10**9]), phone_module._free
    monkeypatch.setattr(phone_module, "_free", lambda device: next(before, None) or really(device))
    network.unplug()
    network.start(size="12m")
    try:
        with pytest.raises(DeviceError, match="there is no space left on the device\n") as raised:
            hold(Adb(network.serial), bundle)
        assert str(raised.value.where).endswith(ROOT)
        assert_nothing_runs(network)
    finally:
        network.unplug()
        network.start()


def test_an_old_android_and_one_of_another_processor(phone: Phone, bundle: Path) -> None:
    try:
        for properties, match in (
            ({"ro.build.version.sdk": 25}, "its API level is 25, and 26"),
            ({"ro.build.version.sdk": 34, "ro.product.cpu.abi": "armeabi-v7a"}, "has a processor of armeabi-v7a"),
            (
                {"ro.build.version.sdk": 34, "ro.product.cpu.abi": "arm64-v8a"},
                "there is no crayon-bench for aarch64 here",
            ),
        ):
            phone.properties(properties)
            with pytest.raises(DeviceError, match=match):
                given = Path("/bin/true") if "v7a" in match else None
                hold(Adb(phone.serial, bench=given), bundle)
        phone.properties(
            {
                "ro.build.version.sdk": 34,
                "ro.product.cpu.abi": "x86_64",
                "ro.product.manufacturer": "Maker",
                "ro.product.model": "P 1",
            }
        )
        target = Adb(phone.serial)
        with target.hold(asked(bundle), lambda _: None):
            assert target._held is not None
            assert target._held.phone.model == "Maker P 1"
    finally:
        phone.properties(None)


def test_a_device_that_is_unplugged_in_the_middle(network: Phone, bundle: Path) -> None:
    target = Adb(network.serial)
    try:
        with pytest.raises(DeviceError, match="the device was lost, or adb cannot reach it"):  # noqa: SIM117
            with target.hold(asked(bundle), lambda _: None) as held:
                running = results(target, job(held, LONG))
                next(running)  # the machine before it begins
                network.unplug_in(1.0)
                list(running)
    finally:
        network.unplug()
        network.start()
    hold(Adb(network.serial), bundle)
    assert_nothing_runs(network)


@pytest.mark.parametrize(
    "devices, serial, match",
    [
        ("", None, "no device is connected"),
        ("", "abc", "there is no device abc; connected: none"),
        ("abc\tdevice\n", "xyz", "there is no device xyz; connected: abc"),
        ("abc\tdevice\nxyz\tdevice\n", None, "several devices are connected: abc, xyz"),
        ("abc\tunauthorized\n", None, "the device does not trust this computer yet"),
        ("abc\toffline\n", "abc", "the device cannot be used, adb says: offline"),
    ],
)
def test_devices_that_cannot_be_used(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str, serial: str | None, match: str
) -> None:
    with scripted_server(own_server(tmp_path, monkeypatch), devices), pytest.raises(DeviceError, match=match) as raised:
        hold(Adb(serial), bundle)
    assert raised.value.do


def test_what_the_bundle_lacks_is_said_first(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nothing that executorch runs: it was exported for onnx"):
        hold(Adb(), bundles.write_model(tmp_path / "onnx"))
    with pytest.raises(BackendError, match="runs programs of ExecuTorch only"):
        hold(Adb(), bundle, backend="onnx")
    with pytest.raises(AdapterError, match="there is no adapter 'carol'"):
        hold(Adb(), bundle, adapter="carol")


@pytest.mark.parametrize("kind", ["folder", "archive", "wheel"])
def test_where_crayon_bench_comes_from(phone: Phone, bundle: Path, tmp_path: Path, kind: str) -> None:
    installed = Path(str(needs.native().__file__)).parent
    given = tmp_path / "crayon_native"
    shutil.copytree(installed, given, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if kind == "archive":  # as `make wheels` makes it, with a C library of its own
        build = needs.native_wheel().parent.parent
        install = [shutil.which("cmake", path=Path(sys.executable).parent) or "cmake", "--install", build]
        subprocess.run([*install, "--component", "system", "--prefix", given], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(tmp_path / "bench.tar.gz", "w:gz", compresslevel=1) as archive:
            archive.add(given, "crayon-bench-x86_64")
        given = tmp_path / "bench.tar.gz"
    elif kind == "wheel":
        with zipfile.ZipFile(tmp_path / "native.whl", "w") as wheel:
            for path in given.iterdir():
                wheel.write(path, f"crayon_native/{path.name}")
        given = tmp_path / "native.whl"
    target = Adb(phone.serial, bench=given)
    with target.hold(asked(bundle), lambda _: None) as held:
        running = results(target, job(held, LONG))
        next(running)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(list, running)
            mapped = ""
            while not all(name in mapped for name in ("libcrayon_native.so", "libc.so", "libstdc++.so")):
                mapped = phone.shell(f"cat /proc/$(cat {ROOT}/run/pid)/maps")
            phone.shell(f"kill $(cat {ROOT}/run/pid)")
            with pytest.raises(BackendError, match="crayon-bench ended with code 143"):
                ended.result()
    libraries = {Path(line.split()[-1]) for line in mapped.splitlines() if ".so" in line}
    assert {path.name for path in libraries} >= {"libcrayon_native.so", "libc.so.6"}
    own = {path.name for path in libraries if ROOT in str(path) and path.parent.name == "system"}
    assert bool(own) == (kind == "archive")
    assert not own or own >= {"libc.so.6", "libstdc++.so.6", "ld-linux-x86-64.so.2"}


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "there is no such crayon-bench"),
        (b"#!/bin/sh\n", "this crayon-bench is for no processor at all"),
        (b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"), "for aarch64, and the device has a processor of x86_64"),
        ({}, "there is no crayon-bench in it"),
    ],
)
def test_no_crayon_bench(phone: Phone, bundle: Path, tmp_path: Path, content: Any, match: str) -> None:
    given = tmp_path / "given"
    if isinstance(content, bytes):
        given.write_bytes(content)
    elif content is not None:
        given.mkdir()
    with pytest.raises(DeviceError, match=match) as raised:
        hold(Adb(phone.serial, bench=given), bundle)
    assert "make wheels" in str(raised.value.do)


def test_a_program_that_says_something_else(phone: Phone, bundle: Path, tmp_path: Path) -> None:
    shutil.copy("/bin/true", tmp_path / "crayon-bench")
    target = Adb(phone.serial, bench=tmp_path / "crayon-bench")
    with target.hold(asked(bundle), lambda _: None) as held, pytest.raises(BackendError, match="crayon-bench said b''"):
        list(results(target, job(held, SHORT)))


def test_what_it_prints_is_json() -> None:
    program = Path(str(needs.native().__file__)).with_name("crayon-bench")
    sizes = ["--prompt", "3,5", "--decode", "2", "--position", "0", "--repeat", "2", "--threads", "1", "--cold"]
    said = subprocess.run([program, *sizes, exported().path], check=True, capture_output=True).stdout
    rows = json.loads(said)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(3, 0), (5, 0), (0, 2)]
    for row in rows:
        assert 0 <= row["cached_bytes"] <= row["model_size"] + 2 * os.sysconf("SC_PAGE_SIZE")
        assert min(row["load_ns"], row["first_token_ns"], row["rss_bytes"], row["pss_bytes"]) > 0
        assert len(row["warmup_ns"]) == 1
        assert [len(tokens) for tokens in row["token_ns"]] == ([2, 2] if row["n_gen"] else [])
