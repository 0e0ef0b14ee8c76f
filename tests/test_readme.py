"""The commands in README and documentation are run as they stand there.

Every ```console block (lines that begin with `$ ` are commands, the others are output and are not compared) and every ```python
block is run, as a reader would: README by itself, the site's pages one after the other in one folder. A block that cannot run here
stands under a line `<!-- not-run: why -->`; one that shows an error, under `<!-- fails -->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT, absent

SITE = [f"docs/{name}" for name in re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())]
PAGES = ["README.md", *SITE, "CONTRIBUTING.md"]

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not-run|fails)(?:: (?P<why>.+?))? -->\n)?^```(?P<language>\S+)\n(?P<body>.*?)^```$", re.M | re.S
)

LANGUAGES = {"console", "python"}
NOT_CODE = {"json", "jinja", "kotlin", "text", "toml", "yaml"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    language: str
    body: str
    mark: str | None
    why: str | None

    @property
    def commands(self) -> list[str]:
        """What a reader types."""
        if self.language == "python":
            return [self.body]
        return re.findall(r"^\$ (.*(?:(?<=\\)\n.*)*)$", self.body, re.M)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["body"],
            match["mark"],
            match["why"],
        )
        for match in FENCE.finditer(text)
    ]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader works."""
    if not Path(sys.executable).with_name("crayon").exists():
        absent("the command crayon", "run the tests with `make test`, which installs it")
    return tmp_path_factory.mktemp("desk")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_run_or_is_no_code(page: str) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES | NOT_CODE
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.M)) == 2 * len(blocks(page)), "a fence without a language, or indented"
    for block in blocks(page):
        assert block.language in NOT_CODE or block.commands, f"line {block.line}: no command in it"
        assert block.mark != "not-run" or block.why, f"line {block.line}: does not say why it is not run"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in LANGUAGES for b in blocks(page))])
def test_the_commands_of_a_page_run(page: str, desk: Path, record_property: Callable[[str, object], None]) -> None:
    folder = desk / ("site" if page in SITE else page)
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "XDG_CACHE_HOME": str(desk / ".cache"),
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    for block in (b for b in blocks(page) if b.language in LANGUAGES):
        for command in block.commands:
            shown = f"{page}:{block.line}: " + (command if block.language == "console" else "(Python)")
            if block.mark == "not-run":
                record_property("documented command not run", f"{shown}   ({block.why})")
                continue
            line = [sys.executable, "-c", command] if block.language == "python" else ["bash", "-c", command]
            done = subprocess.run(
                line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            said = f"{shown}\nexit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            assert (done.returncode == 1) if block.mark == "fails" else (done.returncode == 0), said
            assert "Traceback" not in done.stderr, said
            record_property("documented command", shown)
