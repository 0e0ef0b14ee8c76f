"""`crayon demo`, in full: two LoRAs, an int4 bundle, a process without torch, a report."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from crayon_server import demo
from crayon_server.cli import demo as cli_demo
from tests.support import needs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    for package in ("torch", "transformers", "peft"):
        needs.module(package)
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(cli_demo.demo, ["--out", str(out), "--threads", "1", "--json"], catch_exceptions=False)
    return out, json.loads(result.stdout)


def test_customized_users_are_understood(done) -> None:
    report = done[1]
    exact = {(s["model"], s["user"]): s["exact_match"] for s in report["int4"]}
    for user, other in (("alice", "bruno"), ("bruno", "alice")):
        assert exact[user, user] >= 0.9
        assert exact["base", user] <= 0.5
        assert exact[other, user] <= 0.1


def test_int4_is_as_good_as_float(done) -> None:
    report = done[1]
    for int4, float32 in zip(report["int4"], report["float32"], strict=True):
        assert (int4["model"], int4["user"]) == (float32["model"], float32["user"])
        if int4["model"] == int4["user"]:
            assert int4["exact_match"] >= float32["exact_match"] - 0.05


def test_the_device_process_is_light(done) -> None:
    device = done[1]["device"]
    assert not device["torch_loaded"]
    assert device["peak_rss_bytes"] < 200e6
    assert device["running_answer_kept"]
    assert len(set(device["live"].values())) == 3
    assert device["swap_ms"] <= 5


def test_the_files(done) -> None:
    out, report = done
    assert sorted(path.name for path in out.iterdir()) == ["bundle", "lora", "report.html", "report.json"]
    assert json.loads((out / "report.json").read_text()) == report


def test_the_page_stands_alone(done) -> None:
    page = (done[0] / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", page)
    for line in done[1]["lines"]:
        assert line["prompt"] in page
    assert "prefers-color-scheme: dark" in page


def test_the_summary(done) -> None:
    report = demo.DemoReport(
        **{
            **done[1],
            "personas": [demo.Persona(**p) for p in done[1]["personas"]],
            "int4": [demo.Score(**s) for s in done[1]["int4"]],
        }
    )
    assert re.search(r"with alice's LoRA, int4\s+\d+%\s+\d+%", report.to_text())
