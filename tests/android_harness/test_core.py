"""The Kotlin runtime against the Python one: Maven builds, lints and tests it on bundles that the exporter just made, with services to talk to."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support import ROOT, needs

HARNESS = ROOT / "android_harness"


@pytest.mark.slow
def test_it_says_what_the_python_runtime_says(tmp_path: Path) -> None:
    maven = needs.maven()
    for module in ("peft", "sentencepiece", "uvicorn", "fastapi"):
        needs.module(module)
    fixtures = tmp_path / "fixtures"
    build = [maven, "--batch-mode", "--no-transfer-progress", "clean", "verify", f"-Dcrayon.fixtures={fixtures}"]
    # With the version of ONNX Runtime that Java has: with int4 weights another one rounds in another way.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(needs.ort_oldest()), *sys.path])}
    made = [sys.executable, "-m", "tests.android_harness.servers", fixtures, needs.reference_model(), *build]
    done = subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    cases = [
        case
        for report in HARNESS.glob("*/target/surefire-reports/TEST-*.xml")
        for case in ET.parse(report).iter("testcase")
    ]
    assert len(cases) > 80
    assert {"EngineTest", "ChatTest"} <= {case.get("classname", "").rpartition(".")[2] for case in cases}
    not_passed = {"failure", "error", "skipped"}
    assert [case.get("name") for case in cases if not_passed & {child.tag for child in case}] == []


def test_the_snippet_of_its_page_is_the_one_that_is_compiled() -> None:
    source = (HARNESS / "core/src/test/kotlin/crayon/app/Assistant.kt").read_text()
    snippet = source.partition("// begin\n")[2].partition("// end\n")[0]
    assert snippet
    assert f"```kotlin\n{snippet}```" in (ROOT / "docs/android.md").read_text()
