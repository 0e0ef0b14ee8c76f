from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from crayon_runtime import cli, golden
from crayon_runtime.cli.common import print_table, progress, size_text
from crayon_runtime.golden import CaseResult, Tolerance
from tests.runtime.bundles import FILES, contents, flip_byte, write_adapter, write_model

Output = pytest.CaptureFixture[str]

OWN = ["verify", "pack", "unpack"]


def verb(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, cli.GROUP)


def crayon(*args: str | Path, verbs: list[EntryPoint] | None = None) -> int:
    own = [verb(name, f"crayon_runtime.cli.bundle:{name}") for name in OWN]
    return cli.main([str(arg) for arg in args], verbs=own + (verbs or []))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of verbs that says so when it is imported."""
    folder = tmp_path / "packages" / "toy_verbs"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("print('toy_verbs was imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.startswith("toy_verbs")]:
        del sys.modules[name]


# The group


def test_help_lists_the_verbs_with_their_summaries(capsys: Output) -> None:
    assert crayon("--help") == 0
    output = capsys.readouterr().out
    assert "verify  Check a bundle: the hash of every file, then what the model answers" in output
    assert output.index("pack ") < output.index("unpack ") < output.index("verify ")


def test_help_imports_no_verb(package: Path, capsys: Output) -> None:
    (package / "cli.py").write_text('def bake():\n    """Bake bread.\n\n    More.\n    """\nimport absent_package\n')
    (package / "sub").mkdir()
    (package / "sub" / "__init__.py").write_text('@group()\ndef brew():\n    """Brew tea."""\n')
    verbs = [
        verb("bake", "toy_verbs.cli:bake [export]"),
        verb("brew", "toy_verbs.sub:brew"),
        verb("cook", "absent_package.cli:cook [server]"),
        verb("dry", "toy_verbs.cli:dry"),
    ]
    assert crayon("--help", verbs=verbs) == 0
    output = capsys.readouterr().out
    assert "toy_verbs was imported" not in output
    assert "bake    Bake bread\n" in output
    assert "brew    Brew tea\n" in output
    assert "cook    (not installed: pip install 'crayon-edge[server]')\n" in output


def test_a_verb_is_imported_when_it_runs(package: Path, capsys: Output) -> None:
    (package / "cli.py").write_text("import click\n@click.command()\ndef bake():\n    click.echo('baked')\n")
    assert crayon("bake", verbs=[verb("bake", "toy_verbs.cli:bake [export]")]) == 0
    assert capsys.readouterr().out == "toy_verbs was imported\nbaked\n"


@pytest.mark.parametrize(
    "source",
    [
        "import absent_package.inner\n",
        "import click\n@click.command()\ndef bake():\n    import absent_package.inner\n",
        "import click\n@click.group()\ndef bake(): pass\n@bake.command()\ndef cake():\n    import absent_package\n",
    ],
    ids=["on import", "when it runs", "in a group"],
)
def test_a_missing_extra_is_named(package: Path, capsys: Output, source: str) -> None:
    (package / "cli.py").write_text(source)
    args = ["bake", "cake"] if "cake" in source else ["bake"]
    assert crayon(*args, verbs=[verb("bake", "toy_verbs.cli:bake [export]")]) == 1
    error = capsys.readouterr().err
    assert "crayon bake needs the 'export' extra" in error
    assert "pip install 'crayon-edge[export]'" in error


def test_a_package_that_is_not_installed_is_a_missing_extra(capsys: Output) -> None:
    assert crayon("bake", verbs=[verb("bake", "crayon_absent.cli:bake [server]")]) == 1
    assert "pip install 'crayon-edge[server]'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["crayon_runtime.absent:bake [export]", "toy_verbs.absent:bake"])
def test_a_missing_module_of_ours_is_a_bug_and_not_an_extra(package: Path, value: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        crayon("bake", verbs=[verb("bake", value)])


def test_sub_groups_are_one_verb(package: Path, capsys: Output) -> None:
    (package / "cli.py").write_text(
        "import click\n@click.group()\ndef bread(): pass\n"
        "@bread.command()\n@click.argument('n', type=int)\ndef bake(n):\n    click.echo(n * 'loaf ')\n"
    )
    verbs = [verb("bread", "toy_verbs.cli:bread")]
    assert crayon("bread", "bake", "2", verbs=verbs) == 0
    assert "loaf loaf" in capsys.readouterr().out
    assert crayon("bread", "bake", "two", verbs=verbs) == 2


@pytest.mark.parametrize("args", [[], ["bake"], ["--bake"], ["verify"], ["verify", "x", "--threads", "0"]])
def test_wrong_usage_is_2(args: list[str], capsys: Output) -> None:
    assert crayon(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: crayon" in captured.err


def test_an_error_of_the_tree_is_1_and_on_stderr(tmp_path: Path, capsys: Output) -> None:
    assert crayon("verify", tmp_path / "absent", "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: there is no bundle here: No such file or directory\n"
        f"  where: {tmp_path / 'absent'}\n"
        f"  do:    check the path\n"
    )


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "click.Abort"])
def test_an_interruption_is_130(package: Path, capsys: Output, error: str) -> None:
    (package / "cli.py").write_text(f"import click\n@click.command()\ndef bake():\n    raise {error}\n")
    assert crayon("bake", verbs=[verb("bake", "toy_verbs.cli:bake")]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_verb_may_choose_its_exit_code(package: Path) -> None:
    (package / "cli.py").write_text("import click\n@click.command()\n@click.pass_context\ndef bake(c): c.exit(3)\n")
    assert crayon("bake", verbs=[verb("bake", "toy_verbs.cli:bake")]) == 3


def test_the_version(capsys: Output) -> None:
    assert crayon("--version") == 0
    assert capsys.readouterr().out.startswith("crayon 0")


def test_python_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crayon_runtime", "--absent"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Usage: crayon" in done.stderr


# verify, pack, unpack


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


def result(name: str, problem: str | None = None) -> CaseResult:
    error = float("nan") if problem else 2e-5
    return CaseResult(
        name, None, problem is None, error, 2e-6, 3e-9, Tolerance("onnx", "any", 1e-3, 1e-3), "onnx", problem
    )


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[CaseResult]:
    """What the golden cases of any bundle will give."""
    results = [result("greeting"), result("command")]
    monkeypatch.setattr(golden, "replay", lambda bundle, *, backend, threads, on_case: results)
    return results


def test_verify(model: Path, cases: list[CaseResult], capsys: Output) -> None:
    assert crayon("verify", model) == 0
    captured = capsys.readouterr()
    assert captured.err == "8 files, 8.6 kB: sizes and hashes are right\n"
    assert captured.out.splitlines() == [
        "golden case  adapter  backend  logit error  tap error       KL",
        "greeting     -        onnx         2.0e-05    2.0e-06  3.0e-09  ok",
        "command      -        onnx         2.0e-05    2.0e-06  3.0e-09  ok",
    ]


def test_verify_as_json(model: Path, cases: list[CaseResult], capsys: Output) -> None:
    cases.append(result("strange", "the outputs are not finite"))
    assert crayon("verify", model, "--json") == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert (printed["kind"], printed["name"], printed["files"], printed["passed"]) == ("model", "tiny", 8, False)
    assert [case["passed"] for case in printed["golden"]] == [True, True, False]
    assert [case["logit_error"] for case in printed["golden"]] == [2e-5, 2e-5, None]
    assert printed["golden"][0]["tolerance"]["logits"] == 1e-3
    assert "error: 1 of 3 golden cases failed: strange (onnx)" in captured.err


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_verify_finds_a_flipped_byte(
    model: Path, cases: list[CaseResult], capsys: Output, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "cache"))
    path = model
    if form == "archive":
        path = model.with_suffix(".crayon")
        assert crayon("pack", model) == 0
        assert crayon("verify", path) == 0
    content = (path if path.is_file() else path / "model.onnx.data").read_bytes()
    flip_byte(path if path.is_file() else path / "model.onnx.data", content.index(FILES["model.onnx.data"]) + 9)
    assert crayon("verify", path) == 1
    assert "model.onnx.data" in capsys.readouterr().err


def test_verify_without_golden_cases(
    model: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "replay", lambda *_, **__: pytest.fail("not asked for"))
    assert crayon("verify", model, "--no-golden", "--json") == 0
    assert json.loads(capsys.readouterr().out)["golden"] is None
    assert crayon("verify", write_adapter(tmp_path / "alice"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter"


def test_pack_and_unpack(model: Path, tmp_path: Path, capsys: Output) -> None:
    assert crayon("pack", model) == 0
    archive = tmp_path / "m.crayon"
    assert capsys.readouterr().out == f"{archive}: {size_text(archive.stat().st_size)}\n"
    assert crayon("pack", model, "--out", tmp_path / "other.crayon", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "archive": str(tmp_path / "other.crayon"), "bytes": archive.stat().st_size,
    }  # fmt: skip

    assert crayon("unpack", tmp_path / "other.crayon") == 0
    assert contents(tmp_path / "other") == contents(model)
    assert crayon("unpack", archive) == 1
    assert "exists already" in capsys.readouterr().err
    assert crayon("unpack", archive, "--force") == 0
    assert capsys.readouterr().out == f"{model}: 8 files, 8.6 kB\n"
    assert crayon("unpack", archive, "--out", tmp_path / "copy", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(tmp_path / "copy")


def test_unpacking_a_folder_needs_a_place(model: Path, capsys: Output) -> None:
    assert crayon("unpack", model) == 1
    assert "exists already" in capsys.readouterr().err


# What verbs share


def test_a_table_aligns_numbers_to_the_right(capsys: Output) -> None:
    print_table(["name", "count"], [["long name", "7"], ["x", "1234.5"]])
    assert capsys.readouterr().out == "name        count\nlong name       7\nx          1234.5\n"
    print_table(["name", "count"], [])
    assert capsys.readouterr().out == "name  count\n"


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (4_100_000_000, "4.1 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text


def test_progress_is_silent_where_nobody_watches(capsys: Output) -> None:
    with progress("work", 10) as on_bytes:
        on_bytes(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("unit", ["bytes", "cases"])
def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("work", 1000, unit=unit) as on_bytes:
        on_bytes(1000)
    assert "work" in terminal.getvalue()
