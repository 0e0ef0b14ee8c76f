"""What is built with Gradle, and cannot be here, has the versions of what Maven tests."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support import ROOT

HARNESS = ROOT / "android_harness"
MAVEN = "{http://maven.apache.org/POM/4.0.0}"
CATALOGUE = tomllib.loads((HARNESS / "gradle/libs.versions.toml").read_text())


def properties(pom: Path) -> dict[str, str]:
    found = ET.parse(pom).getroot().find(f"{MAVEN}properties")
    assert found is not None
    return {child.tag.removeprefix(MAVEN): child.text or "" for child in found}


@pytest.mark.parametrize("name", sorted(CATALOGUE["versions"].keys() - {"agp", "executorch"}))
def test_a_version_is_that_of_the_tests(name: str) -> None:
    assert CATALOGUE["versions"][name] == properties(HARNESS / "pom.xml")[f"{name}.version"]


def test_the_aar_runs_what_the_exporter_makes() -> None:
    assert f"executorch=={CATALOGUE['versions']['executorch']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_app_is_built_for_the_androids_that_its_resources_are_checked_for() -> None:
    script = (HARNESS / "app/build.gradle.kts").read_text()
    said = dict(re.findall(r'(namespace|minSdk|targetSdk) = "?([\w.]+)"?', script))
    checked = properties(HARNESS / "pom.xml") | properties(HARNESS / "app/pom.xml")
    assert said == {
        "namespace": checked["android.package"],
        "minSdk": checked["android.min-sdk"],
        "targetSdk": checked["android.target-sdk"],
    }
