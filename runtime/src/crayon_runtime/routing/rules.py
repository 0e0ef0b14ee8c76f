"""What may be sent to a server, and how it is changed before: the user's rules.

    # rules.toml: regular expressions of Python, looked for anywhere in the query
    allow = ['^(what|who|how)\\b']       # if there is such a list, something of it must be found
    deny = ['(?i)password', '\\b\\d{16}\\b']  # if something of it is found, nothing is sent

    [[redact]]
    pattern = '[\\w.+-]+@[\\w.-]+'
    replacement = 'somebody@example.org'

`allow` and `deny` look at the query as the user wrote it; then it is redacted, from the first rule to the last.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from crayon_runtime.errors import InvalidInput

Hook = Callable[[str], str | None]

_LARGEST = 1 << 20


class Outgoing(NamedTuple):
    """What becomes of a query: one of the two is None."""

    query: str | None
    """What to send."""
    why: str | None
    """Why nothing may be sent."""


class Rules:
    """What may leave the device.

    Args:
        allow: patterns, of which one must be found in the query; None: none is asked for. An empty list allows nothing.
        deny: patterns, of which none may be found.
        redact: patterns, and what takes the place of each match, as for `re.sub`.
        hook: called at the end with the redacted query; returns what to send, or None to send nothing. Where it raises, nothing
            is sent.

    Raises:
        InvalidInput: a pattern or a replacement is no regular expression.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        redact: Sequence[tuple[str, str]] = (),
        hook: Hook | None = None,
    ) -> None:
        self._allow = None if allow is None else _compiled(allow, "allow")
        self._deny = _compiled(deny, "deny")
        self._redact = [_replaces(*rule, where=f"redact[{n}]") for n, rule in enumerate(redact)]
        self._hook = hook

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, hook: Hook | None = None) -> Rules:
        """The rules of a file.

        Raises:
            InvalidInput: it cannot be read, is no TOML, has a field that nobody knows, or a pattern that is no regular expression;
                `where` names the line, if one can be found.
        """
        text = _read(Path(path))
        try:
            file = msgspec.convert(tomllib.loads(text), _File)
        except tomllib.TOMLDecodeError as e:
            raise InvalidInput(f"this is not TOML: {e}", where=path) from None
        except msgspec.ValidationError as e:
            raise InvalidInput(f"this is not a file of rules: {e}", where=path, do=_FORM) from None
        except RecursionError:
            raise InvalidInput("this is not a file of rules: it is nested too deep", where=path, do=_FORM) from None
        redact = [(rule.pattern, rule.replacement) for rule in file.redact]
        try:
            return cls(allow=file.allow, deny=file.deny, redact=redact, hook=hook)
        except _BadRule as e:
            line = _line(text, e.rule)
            place = f"{path}, {e.where}" if line is None else f"{path}, line {line}: {e.where}"
            raise InvalidInput(e.what, where=place, do=e.do) from None

    def outgoing(self, query: str) -> Outgoing:
        """What may be sent of a query. It never raises."""
        for pattern in self._deny:
            if pattern.search(query):
                return Outgoing(None, f"the rules deny what matches {_shown(pattern)}")
        if self._allow is not None and not any(pattern.search(query) for pattern in self._allow):
            return Outgoing(None, "the rules allow nothing of this kind")
        for pattern, replacement in self._redact:
            query = pattern.sub(replacement, query)
        if self._hook is not None:
            try:
                hooked = self._hook(query)
            except Exception as e:  # noqa: BLE001 - whatever goes wrong in it, nothing may be sent
                return Outgoing(None, f"the hook failed with {type(e).__name__}")
            if not isinstance(hooked, str):
                return Outgoing(None, "the hook forbids it")
            query = hooked
        return Outgoing(query, None) if query.strip() else Outgoing(None, "the rules leave nothing of the query")


class _Redact(Struct, forbid_unknown_fields=True):
    pattern: str
    replacement: str


class _File(Struct, forbid_unknown_fields=True):
    allow: list[str] | None = None
    deny: list[str] = []
    redact: list[_Redact] = []


_FORM = "write allow = [patterns], deny = [patterns], and [[redact]] with a pattern and a replacement; nothing else"


class _BadRule(InvalidInput):
    """Args: rule: the pattern or replacement."""

    def __init__(self, what: str, *, where: str, rule: str) -> None:
        super().__init__(what, where=where, do="see https://docs.python.org/3/library/re.html")
        self.rule = rule


def _compiled(patterns: Sequence[str], name: str) -> list[re.Pattern[str]]:
    return [_compile(pattern, where=f"{name}[{n}]") for n, pattern in enumerate(patterns)]


def _compile(pattern: str, *, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise _BadRule(f"this is not a regular expression: {e}", where=where, rule=pattern) from None


def _replaces(pattern: str, replacement: str, *, where: str) -> tuple[re.Pattern[str], str]:
    compiled = _compile(pattern, where=where)
    try:
        compiled.sub(replacement, "")  # reads the replacement also where nothing matches
    except (re.error, IndexError) as e:
        raise _BadRule(f"this cannot replace what the pattern finds: {e}", where=where, rule=replacement) from None
    return compiled, replacement


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise InvalidInput(f"a file of rules has at most {_LARGEST} bytes", where=path)
        return content.decode()
    except OSError as e:
        raise InvalidInput(f"it cannot be read: {e.strerror or e}", where=path) from None
    except UnicodeDecodeError:
        raise InvalidInput("this is not text in UTF-8", where=path) from None


def _line(text: str, rule: str) -> int | None:
    """Where a string is written, in either kind of quotes: tomllib does not tell."""
    escaped = rule.replace("\\", "\\\\").replace('"', '\\"')
    for number, line in enumerate(text.splitlines(), 1):
        if f"'{rule}'" in line or f'"{escaped}"' in line:
            return number
    return None


def _shown(pattern: re.Pattern[str]) -> str:
    text = pattern.pattern
    return text if len(text) <= 60 else f"{text[:60]}…"
