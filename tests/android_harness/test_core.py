"""The Kotlin runtime against the Python one: Maven builds, lints and tests it on bundles that the exporter just made, with services to talk to."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import msgspec
import pytest

from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from crayon_runtime.profile import Profile
from crayon_runtime.profile import run as profiling
from crayon_runtime.profile.describe import describe
from crayon_runtime.profile.records import Absent, Header, LongRun, Observation, Plan, Sample
from crayon_runtime.profile.sensors import Sensors
from crayon_runtime.profile.target import Result
from tests.support import ROOT, needs

HARNESS = ROOT / "android_harness"


@pytest.mark.slow
def test_it_says_what_the_python_runtime_says(tmp_path: Path) -> None:
    maven = needs.maven()
    for module in ("peft", "sentencepiece", "uvicorn", "fastapi"):
        needs.module(module)
    fixtures = tmp_path / "fixtures"
    build = [maven, "--batch-mode", "--no-transfer-progress", "clean", "verify", f"-Dcrayon.fixtures={fixtures}"]
    # The first compiler of a JVM is enough for programs that run once.
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    # With the version of ONNX Runtime that Java has: with int4 weights another one rounds in another way.
    path = os.pathsep.join([str(needs.ort_oldest()), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "MAVEN_OPTS": quick}
    made = [sys.executable, "-m", "tests.android_harness.servers", fixtures, needs.reference_model(), *build]
    done = subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    cases = [
        case
        for report in HARNESS.glob("*/target/surefire-reports/TEST-*.xml")
        for case in ET.parse(report).iter("testcase")
    ]
    assert len(cases) > 190
    assert {"EngineTest", "ExecuTorchBackendTest", "ChatTest"} <= {
        case.get("classname", "").rpartition(".")[2] for case in cases
    }
    not_passed = {"failure", "error", "skipped"}
    assert [case.get("name") for case in cases if not_passed & {child.tag for child in case}] == []
    check_profile(fixtures / "profile.jsonl")
    for module in ("core", "executorch", "app"):
        assert zipfile.ZipFile(HARNESS / module / "target/dex.zip").namelist() == ["classes.dex"]


def check_profile(written: Path) -> None:
    """What Kotlin's profiler wrote, read as `crayon profile` reads it: no line of it is unknown, and a report can be made."""
    decoder = msgspec.json.Decoder(Result)
    found = [decoder.decode(line) for line in written.read_bytes().splitlines()]
    (header,) = (record for record in found if isinstance(record, Header))
    bundle = Bundle.open(written.parent / "nano")
    with Engine.load(bundle, backend="onnx") as engine:
        ours = describe(engine, bundle, Sensors([0]))
    same = (
        "crayon_version",
        "schema_version",
        "model_name",
        "model_type",
        "model_size",
        "base_fingerprint",
        "context_length",
        "type_k",
    )
    same += ("backends", "adapter", "adapters", "read_bytes", "kv_bytes", "operations")
    assert {name: getattr(header, name) for name in same} == {name: getattr(ours, name) for name in same}
    processes = [i for i, record in enumerate(found) if isinstance(record, Sample) and record.phase == "started"]
    observed = [
        (sum(i > start for start in processes) - 1, r) for i, r in enumerate(found) if isinstance(r, Observation)
    ]
    tests = profiling.tests_of(observed, profiling.Configuration(1, None), header)
    rest = [record for record in found if isinstance(record, Sample | LongRun | Absent)]
    plan = Plan(prompts=[8, 300], generate=4, depths=[0, 16], threads=[1], repetitions=2, rounds=2, long_seconds=0.2)
    profile = Profile([msgspec.structs.replace(header, plan=plan), *rest, *tests])
    labels = {test.label for test in profile.tests}
    assert {
        "pp8, 1 threads",
        "pp300, 1 threads",
        "tg4, 1 threads",
        "tg4 @ d16, 1 threads",
        "ttft 8, 1 threads",
    } <= labels
    assert all(len(test.samples_ns) in (2, 4) and set(test.processes) == {0, 1} for test in profile.tests)
    assert all(test.bandwidth_share for test in profile.tests if test.test == "decode")
    assert profile.long_run is not None
    assert profile.long_run.n_gen > 0
    folder = written.with_suffix("")
    folder.mkdir()
    profile.write(folder)
    assert Profile.read(folder).lines == profile.lines


def test_the_snippet_of_its_page_is_the_one_that_is_compiled() -> None:
    source = (HARNESS / "core/src/test/kotlin/crayon/app/Assistant.kt").read_text()
    snippet = source.partition("// begin\n")[2].partition("// end\n")[0]
    assert snippet
    assert f"```kotlin\n{snippet}```" in (ROOT / "docs/android.md").read_text()
