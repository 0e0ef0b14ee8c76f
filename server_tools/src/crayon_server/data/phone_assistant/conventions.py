"""How a user wants calls written: a convention is a style, a naming and a locale; and reading such a call back."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Style = Literal["call", "json", "kv"]
Naming = Literal["canonical", "verb", "short"]
Locale = Literal["en", "va", "bo"]
Kind = Literal["structure", "function", "key", "value"]

STYLES: tuple[Style, ...] = ("call", "json", "kv")
NAMINGS: tuple[Naming, ...] = ("canonical", "verb", "short")
LOCALES: tuple[Locale, ...] = ("en", "va", "bo")

FUNCTIONS = (
    "alarm.set",
    "alarm.off",
    "timer.start",
    "message.send",
    "music.play",
    "nav.route",
    "calendar.add",
    "weather.get",
    "home.lamp",
    "home.heat",
    "calc.eval",
    "translate.word",
    "units.convert",
    "shop.add",
    "facts.capital",
    "stocks.price",
)
"""The functions of the phone, by their canonical name DOMAIN.ACTION."""


@dataclass(frozen=True)
class Convention:
    """How a user wants calls written.

    Attributes:
        style: `alarm.set(day=monday)`, `{"fn": "alarm.set", "day": "monday"}` or `alarm.set | day: monday`.
        naming: of functions and arguments: `alarm.set`/`day`, `set_alarm`/`arg_day` or `ALs`/`$dy`.
        locale: words of values, clock and degrees; and what is meant by "half seven" (see `world`).
    """

    style: Style
    naming: Naming
    locale: Locale

    def __str__(self) -> str:
        return f"{self.style}/{self.naming}/{self.locale}"


CONVENTIONS = tuple(Convention(*factors) for factors in itertools.product(STYLES, NAMINGS, LOCALES))
"""All 27."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a written call, and what it is part of."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Call:
    """A call as it was written: names and values are those of its convention."""

    style: Style
    function: str
    arguments: tuple[tuple[str, str], ...]

    @property
    def skeleton(self) -> tuple[Style, str, tuple[str, ...]]:
        """The call without its values."""
        return self.style, self.function, tuple(key for key, _ in self.arguments)


def function_name(function: str, naming: Naming) -> str:
    domain, action = function.split(".")
    return {"canonical": function, "verb": f"{action}_{domain}", "short": f"{domain[:2].upper()}{action[0]}"}[naming]


def argument_name(key: str, naming: Naming) -> str:
    return {"canonical": key, "verb": f"arg_{key}", "short": f"${key[0]}{key[-1] if len(key) > 1 else ''}"}[naming]


_MEANING = {function_name(f, naming): f for naming in NAMINGS for f in FUNCTIONS}


def meaning(name: str) -> str | None:
    """The canonical name of the function that some convention calls `name`."""
    return _MEANING.get(name)


def write(function: str, arguments: Iterable[tuple[str, str]], convention: Convention) -> tuple[Piece, ...]:
    """The pieces of a call; their texts, joined, are the completion.

    Args:
        function: canonical name.
        arguments: canonical keys, and values that are already in the user's locale.
    """
    name = Piece(function_name(function, convention.naming), "function")
    named = [(Piece(argument_name(key, convention.naming), "key"), value) for key, value in arguments]
    pieces: list[Piece] = []
    if convention.style == "call":
        pieces += [name, Piece("(", "structure")]
        for i, (key, value) in enumerate(named):
            pieces += [Piece(", ", "structure")] * (i > 0) + [key, Piece("=", "structure"), Piece(value, "value")]
        pieces.append(Piece(")", "structure"))
    elif convention.style == "json":
        pieces += [Piece('{"fn": "', "structure"), name, Piece('"', "structure")]
        for key, value in named:
            quote = "" if value.isdecimal() and str(int(value)) == value else '"'
            pieces += [Piece(', "', "structure"), key, Piece(f'": {quote}', "structure"), Piece(value, "value")]
            pieces += [Piece(quote, "structure")] * bool(quote)
        pieces.append(Piece("}", "structure"))
    else:
        pieces.append(name)
        for key, value in named:
            pieces += [Piece(" | ", "structure"), key, Piece(": ", "structure"), Piece(value, "value")]
    return tuple(pieces)


def read(text: str) -> Call | None:
    """The call that `text` is, in whatever convention; None if it is not one."""
    if text.startswith("{"):
        return _read_json(text)
    if match := re.fullmatch(r"([\w.]+)\((.*)\)", text):
        return _read_pairs("call", match[1], match[2].split(", "), "=")
    name, *pairs = text.split(" | ")
    return _read_pairs("kv", name, pairs, ": ") if re.fullmatch(r"[\w.]+", name) else None


def _read_pairs(style: Style, name: str, pairs: list[str], separator: str) -> Call | None:
    arguments = [tuple(pair.split(separator, 1)) for pair in pairs]
    if not arguments or any(len(argument) != 2 for argument in arguments):
        return None
    return Call(style, name, tuple((key, value) for key, value in arguments))


def _read_json(text: str) -> Call | None:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not pairs or not all(isinstance(v, str | int) for _, v in pairs):
        return None
    (first, name), *rest = pairs
    if first != "fn" or not isinstance(name, str):
        return None
    return Call("json", name, tuple((key, str(value)) for key, value in rest))
