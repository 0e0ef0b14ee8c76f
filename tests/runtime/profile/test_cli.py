"""crayon profile and profile compare, over the fake backend."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from crayon_runtime.cli.profile import profile as command
from crayon_runtime.errors import InvalidInput
from crayon_runtime.profile.document import Profile
from tests.runtime import tiny
from tests.runtime.profiles import InProcess, drawn

RANDOM = np.random.default_rng(0)
SIZES = ["--prompt", "4,9", "--depth", "0,8", "--generate", "4", "--repetitions", "3"]


@pytest.fixture(autouse=True)
def fake_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("crayon_runtime.profile.run.Local", InProcess)


def call(*args: str | Path) -> Result:
    return CliRunner(catch_exceptions=False).invoke(command, [str(arg) for arg in args])


def written(folder: Path, name: str, made: Profile) -> Path:
    (folder / name).mkdir()
    made.write(folder / name)
    return folder / name


def test_a_profile_is_made_and_compared_with_itself(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path).path
    result = call(bundle, "--out", tmp_path / "out", *SIZES)
    assert result.exit_code == 0
    assert {"pp4", "pp9", "tg4", "load_warm"} <= {line.split("  ")[0] for line in result.stdout.splitlines()}
    assert "absent: routing overhead: the model is not customized here" in result.stderr
    again = call("compare", tmp_path / "out", tmp_path / "out", "--max-regression", "0%")
    assert again.exit_code == 0
    assert "0 of " in again.stderr


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path).path
    said = json.loads(call("measure", bundle, "--out", tmp_path / "out", *SIZES, "--json").stdout)
    assert {test["label"] for test in said["tests"]} >= {"pp4", "tg4 @ d8"}
    assert said["header"]["backends"] == "fake"


def test_a_regression_exits_with_1(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = written(tmp_path, "base", drawn(random, between=0.001, within=0.001))
    slow = written(tmp_path, "slow", drawn(random, between=0.001, within=0.001, slower=1.2))
    same = written(tmp_path, "same", drawn(random, between=0.001, within=0.001))
    assert call("compare", same, "--baseline", base / "profile.jsonl", "--max-regression", "10%").exit_code == 0
    result = call("compare", same, slow, "--baseline", base, "--max-regression", "10%")
    assert result.exit_code == 1
    assert re.search(rf"regression: {slow}: tg32 \+(19|20)\.\d%", result.stderr)
    assert call("compare", slow, "--baseline", base, "--max-regression", "30%").exit_code == 0
    assert call("compare", base, slow).exit_code == 0  # says so, and leaves it at that
    said = json.loads(call("compare", base, slow, same, "--json").stdout)
    assert "tg32" in said["regressions"][str(slow)]
    assert said["regressions"][str(same)] == []


@pytest.mark.parametrize(
    "args, match",
    [
        (["compare", "a"], "give at least two profiles"),
        (["compare"], "Missing argument"),
        (["compare", "a", "b", "--max-regression", "much"], "not a percentage"),
        (["compare", "a", "b", "--tolerance", "-3%"], "not from 0% on"),
        (["bundle", "--out", "o", "--prompt", "a,b"], "not a list of whole numbers"),
        (
            ["bundle", "--out", "o", "--target", "moon"],
            "'moon' is no device: it is local, ssh://[user@]host[:port], or adb:",
        ),
        (["bundle", "--out", "o", "--target", "ssh://"], "is no device"),
        (["bundle", "--out", "o", "--target", "ssh://-oProxyCommand=x"], "is no device"),
        (["bundle", "--out", "o", "--target", "ssh://-l@host"], "is no device"),
        (["bundle", "--out", "o", "--target", "ssh://host:port"], "is no device"),
        (["bundle", "--out", "o", "--target", "ssh://host/folder"], "is no device"),
        (["bundle", "--out", "o", "--target", "adb: x"], "is no device"),
        (["bundle", "--out", "o", "--wheels", "w"], "--wheels goes with ssh://, not with local"),
        (
            ["bundle", "--out", "o", "--target", "ssh://host", "--bench", "b"],
            "--bench goes with adb:, not with ssh://host",
        ),
        (["bundle", "--out", "o", "--app"], "--app goes with adb:, not with local"),
        (
            ["bundle", "--out", "o", "--target", "adb:", "--app", "--bench", "b"],
            "either the app measures, or what --bench",
        ),
        (["bundle"], "Missing option '--out'"),
    ],
)
def test_wrong_usage(args: list[str], match: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert match in result.stderr


@pytest.mark.parametrize(
    "text, name, command",
    [
        ("ssh://board", "ssh://board", ["--", "board"]),
        ("ssh://pi@10.0.0.2:2222", "ssh://pi@10.0.0.2:2222", ["-p", "2222", "--", "pi@10.0.0.2"]),
        ("ssh://pi@[fe80::1]:22/", "ssh://pi@fe80::1:22", ["-p", "22", "--", "pi@fe80::1"]),
        ("adb:emulator-5554", "adb:emulator-5554", None),
        ("adb:", "adb:", None),
    ],
)
def test_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, command: list[str] | None
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("crayon_runtime.profile.profile", lambda *_, target, **__: made.append(target) or drawn(RANDOM))
    call("bundle", "--out", tmp_path / "out", "--target", text)
    (target,) = made
    assert target.name == name
    assert command is None or target._command()[:-1][-len(command) :] == command


def test_there_are_no_such_profiles(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        call("compare", tmp_path / "a", tmp_path / "b")


def test_help_names_both_commands() -> None:
    assert {"measure", "compare"} <= set(call("--help").stdout.split())
