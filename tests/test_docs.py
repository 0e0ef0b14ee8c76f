"""The documentation builds without a warning, and the site fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, needs


def test_the_site_builds_and_stands_alone(tmp_path: Path) -> None:
    needs.module("mkdocs")
    needs.module("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "bundle.html", "api.html"} <= {page.name for page in pages}
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]+(?:src|href)=\"?https?://[^\s\">]+", page.read_text())
        assert fetched == [], page.name
