"""What may be sent, and how it is changed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.rules import Rules

FILE = r"""
allow = [
  '^(what|who)\b',
  "\\bplease\\b",
]
deny = ['(?i)password']

[[redact]]
pattern = '([\w.+-]+)@[\w.-]+'
replacement = '\1@example.org'

[[redact]]
pattern = '\d{4,}'
replacement = "0000"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Rules]:
    def read(text: str) -> Rules:
        (tmp_path / "rules.toml").write_text(text)
        return Rules.read(tmp_path / "rules.toml")

    return read


@pytest.mark.parametrize(
    "query, sent",
    [
        ("who is max@home.de, 12345?", "who is max@example.org, 0000?"),
        ("tell me, please", "tell me, please"),
        ("tell me", None),
        ("what is my Password?", None),
        ("whatever", None),
        ("line\nwhat is it", None),
    ],
)
def test_a_file(query: str, sent: str | None, read: Callable[[str], Rules]) -> None:
    outgoing = read(FILE).outgoing(query)
    assert outgoing.query == sent
    assert (outgoing.why is None) == (sent is not None)


def test_no_rules_change_nothing(read: Callable[[str], Rules]) -> None:
    for rules in (read(""), Rules()):
        assert rules.outgoing(" as it is ") == (" as it is ", None)


def test_deny_wins_and_is_named() -> None:
    rules = Rules(allow=["secret"], deny=["secr.t"])
    assert rules.outgoing("a secret") == (None, "the rules deny what matches secr.t")
    assert rules.outgoing("a question") == (None, "the rules allow nothing of this kind")


def test_deny_looks_at_what_the_user_wrote() -> None:
    rules = Rules(deny=["password"], redact=[("password", "…")])
    assert rules.outgoing("my password").query is None


def test_an_empty_list_allows_nothing() -> None:
    assert Rules(allow=[]).outgoing("a query").query is None


def test_redaction_goes_from_the_first_rule_to_the_last() -> None:
    assert Rules(redact=[("a", "b"), ("b", "c")]).outgoing("a b").query == "c c"


@pytest.mark.parametrize("text", ["", " \n"])
def test_when_nothing_is_left_nothing_is_sent(text: str) -> None:
    outgoing = Rules(redact=[(".+", text)]).outgoing("a query")
    assert outgoing == (None, "the rules leave nothing of the query")


def test_the_hook_comes_last_and_sees_what_is_redacted() -> None:
    seen = []

    def hook(query: str) -> str:
        seen.append(query)
        return query.upper()

    assert Rules(redact=[("max", "somebody")], hook=hook).outgoing("who is max").query == "WHO IS SOMEBODY"
    assert Rules(deny=["max"], hook=hook).outgoing("who is max").query is None
    assert seen == ["who is somebody"]


def fails(_: str) -> str:
    raise ValueError("with the query in it")


@pytest.mark.parametrize(
    "hook, why",
    [
        (lambda _: None, "the hook forbids it"),
        (lambda _: 7, "the hook forbids it"),
        (lambda _: "", "the rules leave nothing of the query"),
        (fails, "the hook failed with ValueError"),
    ],
)
def test_a_hook_that_sends_nothing(hook: Any, why: str) -> None:
    assert Rules(hook=hook).outgoing("a query") == (None, why)


def test_a_file_and_a_hook(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(FILE)
    rules = Rules.read(tmp_path / "rules.toml", hook=str.upper)
    assert rules.outgoing("who is a@b?").query == "WHO IS A@EXAMPLE.ORG?"


@pytest.mark.parametrize(
    "text, where, what",
    [
        ("allow = ['a', '(b']", ", line 1: allow[1]", r"no.* a regular expression: missing \)"),
        ("deny = [\n'a',\n'[',\n]", ", line 3: deny[1]", "unterminated character set"),
        ('deny = [\n"\\\\d(",\n]', ", line 2: deny[0]", "missing"),
        ("[[redact]]\npattern = '*'\nreplacement = ''", ", line 2: redact[0]", "nothing to repeat"),
        ("[[redact]]\npattern = 'a'\nreplacement = '\\1'", ", line 3: redact[0]", "invalid group reference"),
        ("[[redact]]\npattern = 'a'\nreplacement = '\\g<b>'", ", line 3: redact[0]", "unknown group name"),
        ('deny = ["\\u0028"]', ", deny[0]", "missing"),
        ("deny = ['(?P<a>x)(?P<a>y)']", ", line 1: deny[0]", "redefinition"),
        ("deny = ['a{99999999999999999999}']", ", line 1: deny[0]", "regular expression"),
        ("deny = ['a' 'b']", "", "not TOML: .*line 1"),
        ("deny = 'a'", "", "Expected `array`"),
        ("deny = [7]", "", "Expected `str`"),
        ("denny = ['a']", "", "unknown field `denny`"),
        ("[[redact]]\npattern = 'a'", "", "missing required field `replacement`"),
        ("[[redact]]\npattern = 'a'\nreplacement = 'b'\nflags = 'i'", "", "unknown field `flags`"),
        ("deny = " + "[" * 5000, "", "TOML|too deep"),
    ],
)
def test_a_file_that_is_wrong(text: str, where: str, what: str, read: Callable[[str], Rules], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=what) as raised:
        read(text)
    assert raised.value.where == f"{tmp_path / 'rules.toml'}{where}"


@pytest.mark.parametrize("content, what", [(b"\xff\xfe", "UTF-8"), (b"#" * (2 << 20), "at most 1048576 bytes")])
def test_a_file_that_is_no_text(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_bytes(content)
    with pytest.raises(InvalidInput, match=what):
        Rules.read(tmp_path / "rules.toml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        Rules.read(tmp_path / "rules.toml")
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        Rules.read(tmp_path)


@pytest.mark.parametrize(
    "options, where",
    [({"allow": ["("]}, "allow[0]"), ({"deny": ["a", "("]}, "deny[1]"), ({"redact": [("a", "\\9")]}, "redact[0]")],
)
def test_rules_of_a_program_that_are_wrong(options: dict[str, Sequence[Any]], where: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        Rules(**options)
    assert raised.value.where == where
