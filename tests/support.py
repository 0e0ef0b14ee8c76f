"""What a test may need and a machine may lack: asked for in one way, so that everything that was not run is reported.

    from tests.support import needs

    def test_a_full_disk_is_a_clear_error():
        with needs.tmpfs(64 * 1024) as disk: ...

Where the thing is absent the test does not run, and the summary says what was missing and how to get it; in strict mode
(`CRAYON_STRICT=1`, as on the build server) it fails instead. There is no other way to skip: `conftest.py` makes any other skip fail.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent

STRICT = os.environ.get("CRAYON_STRICT", "0") not in ("", "0")


def absent(what: str, get: str) -> NoReturn:
    """Leave the running test (or, at module level, the file) because `what` is not here; `get` says how to have it."""
    if STRICT:
        pytest.fail(f"strict mode: {what} is not here; to have it: {get}", pytrace=False)
    pytest.skip(f"{_MARK}{what} | {get}", allow_module_level=True)


_MARK = "not here: "


def parse_reason(reason: str) -> tuple[str, str] | None:
    """(what, how to get it) of a reason that `absent` made; None for any other."""
    _, mark, rest = reason.partition(_MARK)
    what, bar, get = rest.partition(" | ")
    return (what, get) if mark and bar else None


class Needs:
    """One method for each kind of thing."""

    def module(self, name: str) -> ModuleType:
        """Import a package of the `dev` extra."""
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{name}.".startswith(f"{e.name}."):
                raise
            absent(f"the Python package {e.name}", "pip install -c constraints.txt -e '.[dev]'")

    @contextmanager
    def tmpfs(self, size: int) -> Iterator[Path]:
        """A file system of its own, in memory, that holds `size` bytes."""
        with tempfile.TemporaryDirectory() as folder:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
            if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
                absent("a small tmpfs", "run as root, where mounting is allowed (Debian package: mount)")
            try:
                yield Path(folder)
            finally:
                subprocess.run(["umount", "--lazy", folder], check=True)

    def chromium(self) -> Path:
        """A browser for Playwright, whose own are not downloaded."""
        found = shutil.which("chromium")
        if found is None:
            absent("the browser chromium", "install the Debian package chromium")
        return Path(found)

    def reference_model(self) -> Path:
        """stories260K: a real trained LLaMA, as a Hugging Face model folder with a sentencepiece tokenizer."""
        folder = ROOT / "tests/data/stories260K"
        if not (folder / "model.safetensors").is_file():
            absent("the model stories260K", "run the tests in a full checkout: tests/data/stories260K")
        return folder

    def ort_oldest(self) -> Path:
        """A folder to put first in PYTHONPATH: the oldest onnxruntime that a bundle must run in."""
        folder = os.environ.get("CRAYON_ORT_OLDEST", "")
        if not folder or not Path(folder, "onnxruntime").is_dir():
            absent("the oldest supported onnxruntime", "run the tests with `make test`, which installs it")
        return Path(folder)

    def maven(self) -> Path:
        """The program `mvn`, with a JDK that compiles for Java 17."""
        found, compiler = shutil.which("mvn"), shutil.which("javac")
        says = (
            subprocess.run([compiler, "-version"], capture_output=True, text=True, check=True).stdout
            if compiler
            else ""
        )
        version = re.search(r"javac (\d+)", says)
        if found is None or version is None or int(version[1]) < 17:
            absent("Maven with a JDK of version 17", "install the Debian packages maven and openjdk-17-jdk-headless")
        return Path(found)

    def sshd(self) -> Path:
        """OpenSSH's server, which can be started by this user."""
        found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
        if found is None or shutil.which("ssh") is None:
            absent("OpenSSH's server and client", "install the Debian packages openssh-server and openssh-client")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where there is no init, nobody else makes it
        return Path(found)

    def adbd(self) -> Path:
        """Android's adbd, and the right to start it in a network namespace."""
        found = Path("/usr/lib/android-sdk/platform-tools/adbd")
        if not found.exists() or shutil.which("adb") is None or shutil.which("ip") is None:
            absent(
                "adbd",
                "install the Debian packages adbd, adb and iproute2; for Debian 12 adbd is in bookworm-backports",
            )
        if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False).returncode:
            absent("a network namespace", "run as root, where namespaces are allowed")
        return found

    def native(self) -> ModuleType:
        """The runner of ExecuTorch programs, `crayon_native`."""
        try:
            return importlib.import_module("crayon_native")
        except ModuleNotFoundError as e:
            if e.name != "crayon_native":
                raise
            absent("crayon_native", f"make native ({_COMPILER})")

    def native_wheel(self) -> Path:
        """The wheel of `crayon_native` for this machine. Beside its folder lies what it was built from."""
        return _built("build/native/wheel/*.whl")

    def kernels_library(self) -> Path:
        """The kernels behind C functions for tests."""
        return _built("build/native/libkernels_test.so", "CRAYON_KERNELS_LIBRARY")

    def sanitized_library(self, name: str = "libcrayon_native.so") -> Path:
        """A library, or `libkernels_test.so`, with AddressSanitizer: for a process that was started with LD_PRELOAD."""
        return _built("build/native-sanitized/libcrayon_native.so", "CRAYON_NATIVE_ASAN").with_name(name)

    def aarch64(self) -> Path:
        """An ARM board's files for `qemu-aarch64`: Debian in `root`, Python packages in `site`; our wheel and libraries."""
        emulator = shutil.which("qemu-aarch64")
        says = (
            subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
            if emulator
            else ""
        )
        version = re.search(r"version (\d+)", says)
        if version is None or int(version[1]) < 10:
            absent(
                "qemu-aarch64 10 or newer",
                "install the Debian package qemu-user; for Debian 12 it is in bookworm-backports",
            )
        folder = ROOT / "build/aarch64"
        if not all((folder / part).is_dir() for part in ("root", "site/crayon_native", "wheel")):
            absent("the files of an ARM board", "make aarch64 (Debian package: g++-aarch64-linux-gnu)")
        return folder


_COMPILER = "Debian package: g++"


def _built(pattern: str, variable: str = "") -> Path:
    """What `make test` has built: at `pattern` in the tree, or where an environment variable says."""
    elsewhere = os.environ.get(variable)
    for found in [Path(elsewhere)] if elsewhere else ROOT.glob(pattern):
        if found.is_file():
            return found
    absent(f"a build of runtime/native ({pattern})", f"run the tests with `make test` ({_COMPILER})")


needs = Needs()
