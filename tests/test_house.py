"""The rules of the house: which way imports point, what the repository holds, and what is built from it."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.support import ROOT, absent, needs

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PACKAGES = {Path(p).name: ROOT / p for p in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}

HEAVY = {
    "accelerate",
    "executorch",
    "matplotlib",
    "onnx",
    "peft",
    "scipy",
    "sentencepiece",
    "sklearn",
    "torch",
    "transformers",
}

BANNED = {
    "crayon_runtime": HEAVY | {"crayon_export", "crayon_server"},
    "crayon_export": {"accelerate", "crayon_server", "peft", "scipy", "sklearn", "transformers"},
    "crayon_server": set[str](),
}


def repository_files() -> list[Path]:
    """Everything that a commit would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        absent("a git checkout", "git clone the repository (Debian package: git)")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def imported(source: Path) -> Iterator[str]:
    """Top-level names of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    wrong = {
        f"{source.relative_to(ROOT)} imports {name}"
        for source in PACKAGES[package].rglob("*.py")
        for name in imported(source)
        if name in BANNED[package]
    }
    assert not wrong


def declared(*extras: str) -> set[str]:
    """Names of the distributions that these extras ask for, with those of the runtime."""
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return {re.split(r"[<>=\[~!; ]", requirement)[0].replace("_", "-") for requirement in wanted} - {
        "crayon-edge",
        "crayon-edge-native",
    }


ONLY_FOR_BENCHMARKS = {"gguf": ["gguf"], "llama_cpp": ["llama-cpp-python"]}
"""Modules that `make bench` installs, and their distributions."""

DEVICE_SERVER = "runtime/src/crayon_runtime/server"
"""Of all parts of the runtime the only one that needs an extra."""


@pytest.mark.parametrize(
    "folder, extras",
    [
        ("runtime", ["device", "grammar"]),
        (DEVICE_SERVER, ["serve"]),
        ("export", ["export", "pte", "pth"]),
        ("server_tools", ["eval", "export", "serve", "server"]),
        ("tests", ["device", "eval", "export", "grammar", "pte", "pth", "serve", "server", "dev"]),
        ("benchmarks", ["eval", "export", "grammar", "pth", "serve", "server", "dev", "bench"]),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: list[str]) -> None:
    ours = {*PACKAGES, "crayon_native", "tests", "benchmarks", "_typeshed", *sys.stdlib_module_names}
    owners = {**ONLY_FOR_BENCHMARKS, **importlib.metadata.packages_distributions()}
    undeclared = {
        f"{source.relative_to(ROOT)} imports {name}"
        for source in (ROOT / folder).rglob("*.py")
        if folder != "runtime" or not source.is_relative_to(ROOT / DEVICE_SERVER)
        for name in set(imported(source)) - ours
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, [])} & declared(*extras)
    }
    assert not undeclared


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    wanted_later = {"fastapi", "httpx", "jinja2", "llguidance", "onnxruntime", "rich", "tokenizers", "uvicorn"}
    program = f"""
        import sys
        import crayon_runtime, crayon_runtime.cli
        heavy = {HEAVY | wanted_later | {"crayon_export", "crayon_server"}!r}
        print(*sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_module_of_the_runtime_imports_where_nothing_heavy_is_installed() -> None:
    program = f"""
        import importlib, pkgutil, sys

        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {BANNED["crayon_runtime"]!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, NotInstalled())
        import crayon_runtime

        for module in pkgutil.walk_packages(crayon_runtime.__path__, "crayon_runtime."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_top_level_folders_are_there() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in repository_files() if len(path.relative_to(ROOT).parts) > 1}
    assert folders >= {"android_harness", "benchmarks", "docs", "export", "runtime", "server_tools", "tests"}
    assert folders <= {".ci", "android_harness", "benchmarks", "docs", "export", "runtime", "server_tools", "tests"}


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.$})/-])/(wor" + r"k|roo" + r"t|home|tmp/envs|tmp/work)/[\w.]")
PACKAGE_HOST = re.compile(
    "pythonhosted" + r"\.org|pypi" + r"\.org|repo1?\.maven|crates" + r"\.io|npmjs" + r"\.(org|com)"
)
TRACKER = re.compile(r"\bissue" + r"s? #?\d", re.IGNORECASE)


def test_no_file_speaks_of_a_machine_a_package_host_or_a_tracker() -> None:
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}"
                for pattern in (MACHINE_PATH, PACKAGE_HOST, TRACKER)
                if (match := pattern.search(line))
            ]
    assert not found


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.+!]+( ; .+)?", line)] == []
    pinned = {line.partition("==")[0] for line in lines}
    assert declared(*PYPROJECT["project"]["optional-dependencies"]) <= pinned


COMMANDS = PYPROJECT["project"]["entry-points"]["crayon.commands"]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_is_a_click_command_with_a_summary(verb: str) -> None:
    target, _, extra = COMMANDS[verb].partition(" ")
    command = pkgutil.resolve_name(target)
    assert isinstance(command, click.Command)
    assert command.name == verb
    assert command.get_short_help_str()
    assert extra.strip("[]") in {"", *PYPROJECT["project"]["optional-dependencies"]}


def test_the_installed_distribution_has_the_same_verbs() -> None:
    try:
        importlib.metadata.distribution("crayon-edge")
    except importlib.metadata.PackageNotFoundError:
        absent("an installed crayon-edge", "run the tests with `make test`, which installs it")
    installed = {point.name: point.value for point in importlib.metadata.entry_points(group="crayon.commands")}
    assert installed == COMMANDS


def test_the_wheel_holds_the_packages_with_their_data_and_asks_for_little(tmp_path: Path) -> None:
    needs.module("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_name).decode()
    files = repository_files()
    for name, folder in PACKAGES.items():
        inside = {f"{name}/{path.relative_to(folder).as_posix()}" for path in files if path.is_relative_to(folder)}
        assert f"{name}/py.typed" in inside
        assert inside <= names
    required = [line.split(" ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    always = {re.split(r"[<>=\[]", line)[0] for line in required if "extra ==" not in line}
    assert always == {
        "click", "httpx", "jinja2", "msgspec", "numpy", "onnxruntime", "platformdirs", "pynacl", "rich", "safetensors", "tokenizers",
    }  # fmt: skip
