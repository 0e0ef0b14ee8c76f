"""An ARM board, emulated: kernels, runner and both backends compute there what they compute elsewhere.

A Cortex-A76 (Raspberry Pi 5) has instructions for products of bytes and half floats, a Cortex-A72 (Raspberry Pi 4) has not.
Emulation judges results, never time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.programs import exported
from tests.support import ROOT, needs

BEST = {"cortex-a76": "dotprod", "cortex-a72": "neon"}
"""Instructions that the kernels use on each processor."""


class Board:
    """Runs programs for ARM in the files of a board, on a processor's instructions."""

    def __init__(self, processor: str) -> None:
        self.files = needs.aarch64()
        self.processor = processor

    def run(self, *command: str | Path, **environment: str | Path) -> str:
        """What the command writes; it must succeed."""
        emulator = ["qemu-aarch64", "-cpu", self.processor, "-L", self.files / "root"]
        kept = {
            name: value for name, value in os.environ.items() if name in ("HOME", "PATH", "TMPDIR", "XDG_CACHE_HOME")
        }
        done = subprocess.run(
            [*emulator, *command], env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def python(self, *arguments: str | Path, **environment: str | Path) -> str:
        """Python there, with the runtime of this checkout and the packages that it needs."""
        path = f"{ROOT / 'runtime/src'}{os.pathsep}{self.files / 'site'}"
        environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return self.run(self.files / "root/usr/bin/python3.11", *arguments, **environment)


@pytest.fixture(scope="module", params=BEST)
def board(request: pytest.FixtureRequest) -> Board:
    return Board(request.param)


def test_the_best_instructions_of_the_processor_are_used(board: Board) -> None:
    program = (
        "import crayon_native; crayon_native.start(2); print(crayon_native.instruction_set(), crayon_native.threads())"
    )
    assert board.python("-c", program).split() == [BEST[board.processor], "2"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "executorch"])
def test_the_golden_cases_pass(board: Board, backend: str, tmp_path: Path) -> None:
    bundle = exported()
    verify = ["-m", "crayon_runtime", "verify", bundle.path, "--backend", backend, "--json"]
    cases = json.loads(board.python(*verify, XDG_CACHE_HOME=tmp_path))["golden"]
    assert {case["backend"] for case in cases} == {backend}
    assert {case["adapter"] for case in cases} == {None, "alice", "bruno"}
    assert all(case["passed"] for case in cases)


@pytest.mark.slow
def test_the_kernels_compute_what_numpy_does(board: Board) -> None:
    # All of them take minutes there.
    shapes = "(shapes and 4-100) or (any_position and 257) or (zero_points and 100) or largest or masks or pieces"
    products = "(int4 and 200-) or (int8 and 17) or several or extreme or operand or ends"
    some = f"{BEST[board.processor]} and ({shapes} or {products}) or rounded or errors"
    files = [ROOT / f"tests/native/test_{what}.py" for what in ("attention", "linear", "elementwise")]
    library = board.files / "libkernels_test.so"
    ran = board.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, *files, CRAYON_KERNELS_LIBRARY=library
    )
    passed = re.search(r"(\d+) passed", ran)
    assert passed is not None
    assert int(passed[1]) > 20


@pytest.mark.slow
def test_crayon_bench_runs(board: Board) -> None:
    short = ["--prompt", "8", "--decode", "2", "--position", "4", "--repeat", "1", "--threads", "1"]
    prefill, decode = json.loads(board.run(board.files / "crayon-bench", *short, exported().path))
    assert (prefill["n_prompt"], decode["n_gen"], decode["n_depth"]) == (8, 2, 4)
