"""Is that a call of the phone assistant? A judge that shares no line with the grammar: Python's json with jsonschema, and a parser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from crayon_server.data.phone_assistant import Convention, conventions, world
from crayon_server.data.phone_assistant.conventions import argument_name, function_name


class Reader:
    """Reads a text from left to right, and fails where it is not what is wanted."""

    def __init__(self, text: str) -> None:
        self.rest = text

    def take(self, literal: str) -> None:
        assert self.rest.startswith(literal), (self.rest, literal)
        self.rest = self.rest[len(literal) :]

    def one_of(self, choices: list[str]) -> str:
        found = [choice for choice in choices if self.rest.startswith(choice)]
        assert found, self.rest
        self.take(max(found, key=len))
        return max(found, key=len)

    def match(self, pattern: str) -> None:
        found = re.match(pattern, self.rest)
        assert found, (self.rest, pattern)
        self.rest = self.rest[found.end() :]


def time(reader: Reader, locale: str) -> None:
    reader.match(
        r"([1-9]|10|11):(00|15|30|45) (AM|PM)" if locale == "en" else r"(0[1-9]|1[013-9]|2[0-3]):(00|15|30|45)"
    )


def number(reader: Reader, _: str) -> None:
    reader.match(r"[0-9]+")


def any_of(words: list[str], *, translated: bool = False) -> Callable[[Reader, Any], None]:
    def parse(reader: Reader, locale: Any) -> None:
        reader.one_of([world.translate(word, locale) if translated else word for word in words])

    return parse


def degrees(reader: Reader, locale: str) -> None:
    reader.take("F" if locale == "en" else "C")


def temperature(reader: Reader, locale: str) -> None:
    number(reader, locale)
    reader.take(" ")
    degrees(reader, locale)


def term(reader: Reader, locale: str) -> None:
    number(reader, locale)
    reader.take(" ")
    reader.one_of([sign for _, sign in world.OPERATORS])
    reader.take(" ")
    number(reader, locale)


day, room, good = (any_of(words, translated=True) for words in (world.DAYS, world.ROOMS, world.GOODS))
person, units = any_of(world.PEOPLE), any_of([u for pair in world.UNITS for u in pair])
FUNCTIONS: dict[str, dict[str, Callable[[Reader, Any], None]]] = {
    "alarm.set": {"time": time, "day": day},
    "alarm.off": {"time": time},
    "timer.start": {"n": number, "unit": any_of(["min", "sec"])},
    "message.send": {"to": person, "body": any_of(world.MESSAGES)},
    "music.play": {"genre": any_of(world.GENRES), "room": room},
    "nav.route": {"to": any_of(world.PLACES, translated=True), "by": any_of(world.MODES, translated=True)},
    "calendar.add": {"what": any_of(world.EVENTS, translated=True), "who": person, "day": day, "time": time},
    "weather.get": {"city": any_of(world.CITIES), "day": day, "deg": degrees},
    "home.lamp": {"room": room, "level": number},
    "home.heat": {"room": room, "temp": temperature},
    "calc.eval": {"expr": term},
    "translate.word": {"to": any_of(["va", "bo"]), "out": any_of([w for lexicon in world.LEXICON.values() for w in lexicon.values()])},
    "units.convert": {"n": number, "from": units, "into": units},
    "shop.add": {"item": good, "qty": number},
    "facts.capital": {"of": any_of([*world.CAPITALS]), "answer": any_of([*world.CAPITALS.values()])},
    "stocks.price": {"symbol": any_of([*world.SYMBOLS.values()])},
}  # fmt: skip


def check(text: str, convention: Convention) -> str:
    """The canonical name of the function that a call names.

    Raises:
        AssertionError, ValueError, KeyError, jsonschema.ValidationError: the call is broken.
    """
    names = {function_name(f, convention.naming): f for f in conventions.FUNCTIONS}
    if convention.style == "json":
        call = json.loads(text)
        validator(convention).validate(call)
        for key, parse in FUNCTIONS[names[call["fn"]]].items():
            reader = Reader(str(call[argument_name(key, convention.naming)]))
            parse(reader, convention.locale)
            assert reader.rest == ""
        return names[call["fn"]]
    first, equals, between, last = ("(", "=", ", ", ")") if convention.style == "call" else (" | ", ": ", " | ", "")
    reader = Reader(text)
    function = names[reader.one_of([*names])]
    for i, (key, parse) in enumerate(FUNCTIONS[function].items()):
        reader.take(between if i else first)
        reader.take(argument_name(key, convention.naming))
        reader.take(equals)
        parse(reader, convention.locale)
    reader.take(last)
    assert reader.rest == ""
    return function


@cache
def validator(convention: Convention) -> Any:
    """Of the JSON style's calls."""
    import jsonschema

    calls = []
    for function, arguments in FUNCTIONS.items():
        kinds = {
            argument_name(key, convention.naming): {"type": "integer" if parse is number else "string"}
            for key, parse in arguments.items()
        }
        properties = {"fn": {"const": function_name(function, convention.naming)}} | kinds
        calls.append({"properties": properties, "required": [*properties], "additionalProperties": False})
    return jsonschema.Draft202012Validator({"type": "object", "oneOf": calls})
