"""Profiling in the app on a phone, over Android's own adbd. What the app does is held by android_harness; here Python measures in its place."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from crayon_runtime.cli.profile import profile as command
from crayon_runtime.errors import BackendError, CrayonError, DeviceError, InvalidInput, MissingExtra
from crayon_runtime.profile import Profile
from crayon_runtime.profile.app import PACKAGE, RESULTS, App
from crayon_runtime.profile.jobs import Describe, Measure
from crayon_runtime.profile.phone import ROOT
from crayon_runtime.profile.records import Failure, Header, Observation
from crayon_runtime.profile.target import error_of, results
from tests.programs import exported
from tests.runtime import bundles, phone_app
from tests.runtime.phones import Phone, asked, connected, job

LONG = Measure(prompts=[8], depths=[0], generate=8, rounds=1_000_000, more=False)
SHORT = Measure(prompts=[8], depths=[0], generate=4, rounds=2, more=False)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    with connected(tmp_path_factory.mktemp("phone")) as phone:
        yield phone


@pytest.fixture
def phone(network: Phone) -> Iterator[Phone]:
    """One with the app, and with nothing else of ours."""
    network.shell(f"rm -rf {ROOT}")
    phone_app.install(network.bin)
    yield network
    phone_app.remove(network.bin)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported().path


def assert_nothing_runs(phone: Phone, *, within: float = 0.0) -> None:
    until = time.monotonic() + within
    while (
        left := phone.shell(f"pidof {PACKAGE} && echo runs; ls -d {ROOT}/run; ls {RESULTS}")
    ) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == ""


@pytest.mark.slow
def test_a_phone_is_profiled_in_its_app(phone: Phone, bundle: Path, tmp_path: Path) -> None:
    sizes = ["--prompt", "8", "--depth", "0", "--generate", "4", "--repetitions", "1", "--threads", "1"]
    options = [str(bundle), "--target", "adb:", "--app", "--backend", "onnx", *sizes, "--out"]
    result = CliRunner(catch_exceptions=False).invoke(command, [*options, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    made = Profile.read(tmp_path / "out")
    assert made.header.target == f"adb:{phone.serial}"
    assert (made.header.backends, made.header.model_filename) == ("onnx", bundle.name)
    labels = {test.label.partition(",")[0] for test in made.tests}
    assert labels >= {"pp8", "tg4", "ttft 8", "load_warm", "control_read"}
    assert_nothing_runs(phone)
    # Whoever may read there may do so as another user, as the app is one.
    modes = phone.shell(f"find {ROOT} -type d ! -perm -005; find {ROOT}/*/ -type f ! -perm -004")
    assert modes == ""


def test_jobs_are_done_by_new_processes_and_an_adapter_is_sent(phone: Phone, bundle: Path) -> None:
    target = App(phone.serial)
    steps: list[str] = []
    with target.hold(asked(bundle, adapter="alice"), steps.append) as held:
        assert held.bundle.startswith(ROOT)
        (header,) = (r for r in results(target, job(held, Describe())) if isinstance(r, Header))
        assert header.adapter == "alice"
        found = list(results(target, job(held, SHORT)))
        assert {o.adapter for o in found if isinstance(o, Observation) and o.test == "decode"} == {"alice"}
        with pytest.raises(CrayonError, match="there is no adapter 'carol'"):
            list(results(target, job(held._replace(adapter="carol"), SHORT)))
    assert any("sending" in step for step in steps)
    assert_nothing_runs(phone)


def test_what_fails_while_a_phone_is_held_is_not_its_loss(phone: Phone, bundle: Path) -> None:
    with (
        pytest.raises(ConnectionError, match="of somebody else"),
        App(phone.serial).hold(asked(bundle), lambda _: None),
    ):
        raise ConnectionError("of somebody else")
    assert_nothing_runs(phone)


def test_without_the_app(network: Phone, bundle: Path) -> None:
    with pytest.raises(DeviceError, match="the app crayon.app is not on the phone") as raised:  # noqa: SIM117
        with App(network.serial).hold(asked(bundle), lambda _: None):
            pass
    assert "without --app" in str(raised.value.do)
    assert_nothing_runs(network)


@pytest.mark.parametrize("said", ["Error type 3\nError: Activity class does not exist.", "java.lang.SecurityException"])
def test_an_app_that_cannot_be_started(phone: Phone, bundle: Path, said: str) -> None:
    target = App(phone.serial)
    with target.hold(asked(bundle), lambda _: None) as held:
        (phone.bin / "am").write_text(f"#!/bin/sh\ncat <<.\n{said}\n.\n")
        with pytest.raises(DeviceError, match="benchmark cannot be started: ") as raised:
            list(results(target, job(held, SHORT)))
    assert said.splitlines()[-1] in raised.value.what


def test_an_app_that_dies(phone: Phone, bundle: Path) -> None:
    target = App(phone.serial)
    with target.hold(asked(bundle), lambda _: None) as held:
        (phone.bin / "am").write_text("#!/bin/sh\n")
        with pytest.raises(BackendError, match="the app ended before it had measured"):
            list(results(target, job(held, LONG)))


_INTERRUPTED = """
import sys
from importlib.metadata import EntryPoint
from crayon_runtime import cli
verb = EntryPoint("profile", "crayon_runtime.cli.profile:profile", cli.GROUP)
sizes = ["--prompt", "8", "--depth", "0", "--generate", "500", "--repetitions", "1000"]
sys.exit(cli.main(["profile", *sys.argv[1:], "--app", "--out", "out", *sizes], verbs=[verb]))
"""


@pytest.mark.parametrize("by, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_app_ends_with_the_profile(
    phone: Phone, bundle: Path, tmp_path: Path, by: signal.Signals, code: int
) -> None:
    arguments = [sys.executable, "-c", _INTERRUPTED, str(bundle), "--target", f"adb:{phone.serial}"]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as crayon:
        while phone.shell(f"pidof {PACKAGE} || echo none"):
            assert crayon.poll() is None, crayon.stderr and crayon.stderr.read()
        crayon.send_signal(by)
        crayon.communicate()
    assert crayon.returncode == code
    assert not (tmp_path / "out").exists()
    assert_nothing_runs(phone, within=15)


def test_what_the_bundle_lacks_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nothing that executorch runs"):  # noqa: SIM117
        with App().hold(asked(bundles.write_model(tmp_path / "onnx"), backend="executorch"), lambda _: None):
            pass


@pytest.mark.parametrize(
    "kind, expected", [("InvalidInput", InvalidInput), ("MissingExtra", CrayonError), ("os", CrayonError), ("PathLike", CrayonError)]
)  # fmt: skip
def test_an_error_of_another_process(kind: str, expected: type[CrayonError]) -> None:
    error = error_of(Failure(error=kind, what="it is so", where="there", do=None))
    assert type(error) is expected
    assert not isinstance(error, MissingExtra)
    assert (error.what, error.where, error.do) == ("it is so", "there", None)
