"""The tests of the kernels once more, with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.native.test_fuzz import sanitizer
from tests.support import ROOT, needs


@pytest.mark.slow
def test_the_kernels_touch_no_memory_of_others() -> None:
    library = needs.sanitized_library("libkernels_test.so")
    environment = os.environ | sanitizer() | {"CRAYON_KERNELS_LIBRARY": str(library)}
    best = needs.native().instruction_set()
    some = f"{best} or rounded or errors"
    files = [ROOT / f"tests/native/test_{what}.py" for what in ("attention", "linear", "elementwise")]
    pytest_run = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, *files]
    ran = subprocess.run([sys.executable, *pytest_run], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 100
