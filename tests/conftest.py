"""Nothing is left out silently: skips are counted by what they lack, and only `tests.support.needs` may skip."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support import ROOT, parse_reason


def pytest_configure(config: pytest.Config) -> None:
    # The processes of a session inherit it.
    if not os.environ.get("CRAYON_TEST_PROGRAMS"):
        folder = tempfile.TemporaryDirectory(prefix="crayon-programs-")
        config.add_cleanup(folder.cleanup)
        # Minutes of ExecuTorch's exporter, which `make templates` takes when there is another version of it.
        shutil.copytree(ROOT / "tests/data/templates", Path(folder.name, "cache/crayon/templates"))
        os.environ["CRAYON_TEST_PROGRAMS"] = folder.name
        config.add_cleanup(lambda: os.environ.pop("CRAYON_TEST_PROGRAMS"))
    # A shell starts what runs in the background deaf to Ctrl-C, and so would be the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_other_skips(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_other_skips(report)
    return report


def _refuse_other_skips(report: pytest.TestReport | pytest.CollectReport) -> None:
    expected_failure = hasattr(report, "wasxfail")
    if expected_failure:
        del report.wasxfail
    if expected_failure or (report.skipped and parse_reason(_reason(report)) is None):
        report.outcome = "failed"
        report.longrepr = f"only tests.support.needs may leave a test out, not this: {_reason(report)}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _list_documented_commands(terminalreporter)
    _list_what_was_not_run(terminalreporter)


def _list_documented_commands(terminal: pytest.TerminalReporter) -> None:
    reports = [*terminal.stats.get("passed", []), *terminal.stats.get("failed", [])]
    said = [item for report in reports for item in report.user_properties if item[0].startswith("documented command")]
    if said:
        terminal.section("Commands of README and documentation")
    for kind, command in said:
        terminal.write_line(f"{'not run' if kind.endswith('not run') else 'ran'}: {command}")


def _list_what_was_not_run(terminal: pytest.TerminalReporter) -> None:
    lacking: dict[tuple[str, str], list[str]] = defaultdict(list)
    for report in terminal.stats.get("skipped", []):
        lacking[parse_reason(_reason(report)) or ("?", "?")].append(report.nodeid)
    terminal.section("Not run")
    for (what, get), tests in sorted(lacking.items()):
        terminal.write_line(f"{len(tests)} for want of {what}; to have it: {get}")
        for test in tests:
            terminal.write_line(f"    {test}")
    if not lacking:
        terminal.write_line("nothing was left out for want of something")
