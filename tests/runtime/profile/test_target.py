"""The process that measures: its end is ours, and what goes wrong in it is a clear error here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from crayon_runtime.errors import AdapterError, BackendError, BundleError
from crayon_runtime.profile.jobs import Describe, Job
from crayon_runtime.profile.records import Absent, Failure, Observation
from crayon_runtime.profile.target import Local, results

JOB = Job(bundle="none", backend="auto", adapter=None, threads=1, cpus=None, process=0, work=Describe())


def saying(*lines: bytes, then: str = "") -> Local:
    program = f"import os, sys, time, signal\nfor line in {lines!r}: os.write(1, line + b'\\n')\n{then}"
    return Local((sys.executable, "-c", program))


def test_what_it_says_is_handed_over() -> None:
    said = [Observation(test="decode", n_gen=2, samples_ns=[5]), Absent(what="energy", reason="none")]
    assert list(results(saying(*map(msgspec.json.encode, said)), JOB)) == said


def test_its_errors_are_of_the_same_kind_here() -> None:
    failure = Failure(error="AdapterError", what="there is no adapter 'x'", where="b", do="choose")
    with pytest.raises(AdapterError, match="there is no adapter 'x'") as raised:
        list(results(saying(msgspec.json.encode(failure)), JOB))
    assert (raised.value.where, raised.value.do) == ("b", "choose")


@pytest.mark.parametrize(
    "then, match",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("print('no room', file=sys.stderr); sys.exit(3)", "ended with code 3: no room"),
        ("raise ValueError('surprise')", "ended with code 1: .*ValueError: surprise"),
        ("print('hello')", "said b'hello"),
    ],
)
def test_a_process_that_dies_or_talks_nonsense(then: str, match: str) -> None:
    with pytest.raises(BackendError, match=f"(?s){match}"):
        list(results(saying(then=then), JOB))


def test_leaving_early_ends_it() -> None:
    said = msgspec.json.encode(Absent(what="pid", reason="PID"))
    program = (
        f"import os, time\nos.write(1, {said!r}.replace(b'PID', str(os.getpid()).encode()) + b'\\n')\ntime.sleep(600)"
    )
    running = results(Local((sys.executable, "-c", program)), JOB)
    first = next(running)
    assert isinstance(first, Absent)
    running.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(first.reason), 0)


def test_there_is_no_such_bundle(tmp_path: Path) -> None:
    job = msgspec.structs.replace(JOB, bundle=str(tmp_path / "none"))
    with pytest.raises(BundleError, match="there is no bundle here"):
        list(results(Local(), job))


_INTERRUPTED = """
import sys
from importlib.metadata import EntryPoint
from crayon_runtime import cli
from crayon_runtime.profile import run
from crayon_runtime.profile.target import Local
run.Local = lambda: Local((sys.executable, "-c", "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"))
verb = EntryPoint("profile", "crayon_runtime.cli.profile:profile", cli.GROUP)
sys.exit(cli.main(["profile", "none", "--out", "out"], verbs=[verb]))
"""


def test_ctrl_c_ends_everything_and_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _INTERRUPTED]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as crayon:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert crayon.poll() is None
            time.sleep(0.05)
        crayon.send_signal(signal.SIGINT)
        _, said = crayon.communicate()
    assert crayon.returncode == 130
    assert said.split("\n") == ["what is measured", "", "interrupted", ""]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert {path.name for path in tmp_path.iterdir()} == {"pid", "crayon-profile.lock"}
