"""Profiling over ssh, by a real sshd: what is sent, what is left, and what is said when something is missing or breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from crayon_export.exporter import export
from crayon_runtime.cli.profile import profile as command
from crayon_runtime.errors import AdapterError, BackendError, DeviceError
from crayon_runtime.profile import Profile, board
from crayon_runtime.profile.jobs import Describe, Job
from crayon_runtime.profile.lock import one_at_a_time
from crayon_runtime.profile.push import Item
from crayon_runtime.profile.records import Absent
from crayon_runtime.profile.ssh import Ssh
from crayon_runtime.profile.target import Asked, Result, results
from tests.export.models import tiny_llama, tiny_tokenizer
from tests.runtime import bundles
from tests.runtime.boards import Board, new_key
from tests.support import needs

SAYS_ITS_JOB = """
import json, os, sys
job = json.load(sys.stdin)
print(json.dumps({"type": "absent", "what": json.dumps(job), "reason": str(os.getpid())}), flush=True)
"""
"""A measuring program that loads no model."""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    made = Board(tmp_path / "board", monkeypatch)
    yield made
    made.stop()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.write_model(tmp_path / "a model")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have only this measuring program sent, in the place of the runtime and all that it depends on."""

    def sent(then: str) -> None:
        wheel = tmp_path / "stub.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for package in ("crayon_runtime", "crayon_runtime/profile"):
                archive.writestr(f"{package}/__init__.py", "")
            archive.writestr("stub-1.data/purelib/crayon_runtime/profile/worker.py", SAYS_ITS_JOB + then)
        monkeypatch.setattr("crayon_runtime.profile.wheels.wheelhouse", lambda *_, **__: [wheel])

    return sent


@pytest.fixture(autouse=True)
def tiny_program(program: Callable[[str], None]) -> None:
    program("")


def asked(bundle: Path, **others: Any) -> Asked:
    return Asked(str(bundle), **{"backend": "auto", "adapter": None} | others)


def job(held: Asked, **others: Any) -> Job:
    return Job(**held._asdict(), **{"threads": None, "cpus": None, "process": 0, "work": Describe()} | others)


def said(result: Result) -> tuple[dict[str, Any], int]:
    """The job that the tiny program got, and its process."""
    assert isinstance(result, Absent)
    return json.loads(result.what), int(result.reason)


def hold(there: Board, bundle: Path, **others: Any) -> list[str]:
    """Hold a board and let it go; what was done."""
    steps: list[str] = []
    with Ssh(there.address, there.port).hold(asked(bundle, **others), steps.append):
        pass
    return steps


def assert_nothing_is_left(there: Board, *, within: float = 0.0) -> None:
    """But what a next profile need not send again."""
    until = time.monotonic() + within
    while (list((there.cache / "crayon" / "profile").glob("run-*")) or temporary(there)) and time.monotonic() < until:
        time.sleep(0.05)
    kept = list((there.cache / "crayon" / "profile").iterdir())
    assert [
        path for path in kept if not path.is_file() or board.hashlib.sha256(path.read_bytes()).hexdigest() != path.name
    ] == []
    assert temporary(there) == set()


def temporary(there: Board) -> set[str]:
    """What is in the board's folder for temporary files, but for the lock."""
    return {path.name for path in there.tmp.iterdir()} - {board.LOCK}


def assert_ended(pid: int, *, within: float = 30.0) -> None:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.slow
def test_a_board_is_profiled(there: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(there.folder / "client"), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = export(tiny_tokenizer(tiny_llama(tmp_path / "model")), tmp_path / "bundle").bundle.path
    sizes = ["--prompt", "4", "--depth", "0,8", "--generate", "4", "--repetitions", "1", "--threads", "1"]
    target = f"ssh://{there.address}:{there.port}"
    options = [str(path), "--out", str(tmp_path / "out"), "--target", target, *sizes, "--json"]
    result = CliRunner(catch_exceptions=False).invoke(command, options)
    assert result.exit_code == 0, result.output
    made = Profile.read(tmp_path / "out")
    assert (made.header.target, made.header.backends, made.header.model_filename) == (target, "onnx", "bundle")
    assert {test.label.partition(",")[0] for test in made.tests} >= {"pp4", "tg4", "tg4 @ d8", "ttft 4", "load_warm"}
    assert any(operator.module == "model.layers.1.mlp.down_proj" for operator in made.operators)
    assert all(sample.mapped_bytes is not None for sample in made.samples)
    assert_nothing_is_left(there)


def test_a_job_has_the_paths_of_the_board(there: Board, bundle: Path, tmp_path: Path) -> None:
    other = bundles.write_adapter(tmp_path / "bob", "bob")
    target = Ssh(there.address, there.port)
    with target.hold(asked(bundle, adapter=str(other)), lambda _: None) as held:
        (result,) = results(target, job(held, threads=3))
        got, pid = said(result)
        assert got == msgspec.to_builtins(job(held, threads=3))
        assert Path(got["bundle"]).is_relative_to(there.cache)
        assert Path(got["bundle"]).name == bundle.name
        assert bundles.contents(Path(got["bundle"])) == bundles.contents(bundle)
        assert bundles.contents(Path(got["adapter"])) == bundles.contents(other)
    assert pid != os.getpid()
    assert_nothing_is_left(there)
    with Ssh(there.address, there.port).hold(asked(bundle, adapter="alice"), lambda _: None) as held:
        assert held.adapter == "alice"


def test_only_what_is_missing_is_sent_and_a_name_is_not_believed(there: Board, bundle: Path) -> None:
    assert any("sending" in step for step in hold(there, bundle))
    assert not any("sending" in step for step in hold(there, bundle))
    kept = there.cache / "crayon" / "profile"
    weights = next(path for path in kept.iterdir() if path.read_bytes() == bundles.FILES["model.onnx.data"])
    bundles.flip_byte(weights)
    assert any("sending 1 of " in step for step in hold(there, bundle))
    assert weights.read_bytes() == bundles.FILES["model.onnx.data"]
    (kept / "run-left").mkdir()  # by one that was killed
    hold(there, bundle)
    assert_nothing_is_left(there)


def test_what_arrives_is_compared_with_what_was_meant(
    there: Board, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Item(
        "bundle/a model/report.json", bundle / "report.json", "0" * 64, 1000
    )  # it is another file, and a shorter one
    monkeypatch.setattr("crayon_runtime.profile.ssh.items_of", lambda *_: [changed])
    with pytest.raises(DeviceError, match="is not the file that was to be sent") as raised:
        hold(there, bundle)
    assert raised.value.where == str(bundle / "report.json")
    assert_nothing_is_left(there)


def test_a_login_shell_that_talks(there: Board, bundle: Path) -> None:
    there.python(f'echo welcome; echo "{{}}"; exec {sys.executable} "$@"')
    assert hold(there, bundle)


def test_leaving_a_job_early_ends_it_and_the_next_one_runs(
    there: Board, bundle: Path, program: Callable[[str], None]
) -> None:
    program("import time; time.sleep(600 if job['process'] == 0 else 0)")
    target = Ssh(there.address, there.port)
    with target.hold(asked(bundle), lambda _: None) as held:
        running = results(target, job(held))
        _, pid = said(next(running))
        running.close()  # type: ignore[attr-defined]
        assert_ended(pid, within=0.1)
        assert len(list(results(target, job(held, process=1)))) == 1


@pytest.mark.parametrize(
    "then, match",
    [
        ("os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("sys.exit('no room')", "ended with code 1: no room"),
        ("print('hello')", "said b'hello"),
    ],
)
def test_a_program_that_dies(there: Board, bundle: Path, program: Callable[[str], None], then: str, match: str) -> None:
    program(then)
    target = Ssh(there.address, there.port)
    with target.hold(asked(bundle), lambda _: None) as held, pytest.raises(BackendError, match=match):
        list(results(target, job(held)))


def test_a_connection_that_is_lost(there: Board, bundle: Path, program: Callable[[str], None]) -> None:
    program("import time; time.sleep(600)")
    target = Ssh(there.address, there.port)
    with pytest.raises(DeviceError, match="the connection to the board was lost"):  # noqa: SIM117
        with target.hold(asked(bundle), lambda _: None) as held:
            running = results(target, job(held))
            _, pid = said(next(running))
            there.cut()
            next(running)
    assert_ended(pid)
    assert_nothing_is_left(there, within=30)


_INTERRUPTED = """
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from crayon_runtime import cli
from crayon_runtime.profile import wheels
wheels.wheelhouse = lambda *_, **__: [Path("stub.whl")]
verb = EntryPoint("profile", "crayon_runtime.cli.profile:profile", cli.GROUP)
sys.exit(cli.main(["profile", "a model", "--target", sys.argv[1], "--out", "out"], verbs=[verb]))
"""


@pytest.mark.parametrize("by, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_ctrl_c_or_a_sudden_end_leaves_nothing(
    there: Board, bundle: Path, tmp_path: Path, program: Callable[[str], None], by: signal.Signals, code: int
) -> None:
    program(f"import time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    arguments = [sys.executable, "-c", _INTERRUPTED, f"ssh://{there.address}:{there.port}"]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as crayon:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert crayon.poll() is None, crayon.stderr and crayon.stderr.read()
            time.sleep(0.05)
        crayon.send_signal(by)
        crayon.communicate()
    assert crayon.returncode == code
    assert not (tmp_path / "out").exists()
    assert_ended(int((tmp_path / "pid").read_text()))
    assert_nothing_is_left(there, within=30)


def test_an_unreachable_board(there: Board, bundle: Path) -> None:
    there.stop()
    with pytest.raises(DeviceError, match="cannot be reached: .*Connection refused") as raised:
        hold(there, bundle)
    assert raised.value.where == f"ssh://{there.address}:{there.port}"


def test_a_wrong_key(there: Board, bundle: Path) -> None:
    (there.folder / "key").unlink()
    (there.folder / "key.pub").rename(there.folder / "old.pub")
    new_key(there.folder / "key")
    (there.folder / "old.pub").rename(there.folder / "key.pub")
    with pytest.raises(DeviceError, match="lets nobody in with the keys of this user: .*Permission denied") as raised:
        hold(there, bundle)
    assert f"ssh-copy-id {there.address}" in str(raised.value.do)


def test_host_keys(there: Board, bundle: Path) -> None:
    there.trust()
    with pytest.raises(DeviceError, match="the board's host key is not known here") as raised:
        hold(there, bundle)
    assert f"connect once by hand, and compare it: ssh {there.address}" in str(raised.value.do)
    there.trust(there.folder / "key.pub")
    with pytest.raises(DeviceError, match="the board has another host key than before"):
        hold(there, bundle)


def test_a_board_without_python_or_with_an_old_one(there: Board, bundle: Path) -> None:
    there.start(PATH=there.folder / "nothing")
    with pytest.raises(DeviceError, match="there is no python3 on the board"):
        hold(there, bundle)
    there.start()
    there.python(
        f"""exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (x)'; $2" """
    )
    with pytest.raises(DeviceError, match=r"the board's python3 is 3\.9\.2, which is too old") as raised:
        hold(there, bundle)
    assert "3.11" in str(raised.value.do)
    there.python("echo broken >&2; exit 4")
    with pytest.raises(DeviceError, match="Python does not start on the board: broken"):
        hold(there, bundle)


def test_no_space_on_the_board(there: Board, bundle: Path) -> None:
    with needs.tmpfs(128 * 1024) as disk:
        there.start(XDG_CACHE_HOME=disk)
        (disk / "crayon" / "profile").mkdir(parents=True)
        old = disk / "crayon" / "profile" / ("0" * 64)
        old.write_bytes(bytes(90_000))
        assert any("sending" in step for step in hold(there, bundle))
        assert not old.exists()  # what no profile needs makes room
        large = bundles.write_model(bundle.with_name("large"), weights=os.urandom(120_000))
        with pytest.raises(DeviceError, match=r"no space left on the device: [\d.]+ MB are needed, and [\d.]+ MB free"):
            hold(there, large)
        there.cache = disk
        assert_nothing_is_left(there)


def test_two_profiles_at_once(there: Board, bundle: Path) -> None:
    with one_at_a_time(there.tmp), pytest.raises(BackendError, match="another profile is being made on this device"):
        hold(there, bundle)
    with Ssh(there.address, there.port).hold(asked(bundle), lambda _: None):  # noqa: SIM117
        with pytest.raises(BackendError, match="another profile is being made on this device"):
            hold(there, bundle)
    hold(there, bundle)


def test_what_the_bundle_lacks_is_said_before_anything_is_sent(there: Board, bundle: Path) -> None:
    there.stop()
    with pytest.raises(BackendError, match="nothing that executorch runs: it was exported for onnx"):
        hold(there, bundle, backend="executorch")
    with pytest.raises(AdapterError, match="there is no adapter 'carol'"):
        hold(there, bundle, adapter="carol")


def test_a_board_without_a_runner_of_executorch_is_measured_by_onnx_alone(
    there: Board, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_native(*_: object, native: bool, **__: object) -> list[Path]:
        if native:
            raise DeviceError("there is no wheel of crayon-edge-native for the board")
        return [tmp_path / "stub.whl"]

    monkeypatch.setattr("crayon_runtime.profile.wheels.wheelhouse", without_native)
    for module in ("ssh", "push"):
        monkeypatch.setattr(f"crayon_runtime.profile.{module}.served", lambda _: ["onnx", "executorch"])
    assert any("only by onnxruntime: there is no wheel of crayon-edge-native" in step for step in hold(there, bundle))
    with pytest.raises(DeviceError, match="there is no wheel of crayon-edge-native"):
        hold(there, bundle, backend="executorch")
    assert_nothing_is_left(there)


def test_there_is_no_ssh(there: Board, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(there.folder / "nothing"))
    with pytest.raises(DeviceError, match="there is no `ssh` here"):
        hold(there, bundle)


def agent(cache: Path, silence: float) -> subprocess.Popen[bytes]:
    """What runs on the board, without a connection."""
    command = [sys.executable, board.__file__, str(silence)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_silence_is_taken_for_a_lost_connection(tmp_path: Path) -> None:
    with agent(tmp_path, 0.5) as running:
        assert running.stdout is not None
        assert running.stdin is not None
        assert running.stdout.read(1) == board.OWN
        for _ in range(4):
            time.sleep(0.2)
            running.stdin.write(b"\n")
            running.stdin.flush()
        assert running.poll() is None
        assert running.wait(10) == 0
    assert list((tmp_path / "crayon" / "profile").iterdir()) == []


def test_a_disk_that_becomes_full_while_a_file_arrives() -> None:
    with needs.tmpfs(65536) as disk, agent(disk, 10) as running:
        content = os.urandom(200_000)
        request = {"ask": "put", "sha256": board.hashlib.sha256(content).hexdigest(), "size": len(content)}
        out, _ = running.communicate(json.dumps(request).encode() + b"\n" + content)
        failure = json.loads(out.splitlines()[-1][1:])
        assert failure["error"] == "DeviceError"
        assert "no space left on the device" in failure["what"]
        assert list((disk / "crayon" / "profile").iterdir()) == []
