"""The calls of a convention as a grammar, for constrained output: every call of the world, with every value that fits its argument."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from crayon_server.data.phone_assistant import world
from crayon_server.data.phone_assistant.conventions import FUNCTIONS, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from crayon_server.data.phone_assistant.conventions import Convention, Locale

ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "alarm.set": (("time", "TIME"), ("day", "DAY")),
    "alarm.off": (("time", "TIME"),),
    "timer.start": (("n", "NUMBER"), ("unit", "SPAN")),
    "message.send": (("to", "PERSON"), ("body", "MESSAGE")),
    "music.play": (("genre", "GENRE"), ("room", "ROOM")),
    "nav.route": (("to", "PLACE"), ("by", "MODE")),
    "calendar.add": (("what", "EVENT"), ("who", "PERSON"), ("day", "DAY"), ("time", "TIME")),
    "weather.get": (("city", "CITY"), ("day", "DAY"), ("deg", "DEGREES")),
    "home.lamp": (("room", "ROOM"), ("level", "NUMBER")),
    "home.heat": (("room", "ROOM"), ("temp", "TEMPERATURE")),
    "calc.eval": (("expr", "EXPRESSION"),),
    "translate.word": (("to", "LANGUAGE"), ("out", "FOREIGN")),
    "units.convert": (("n", "NUMBER"), ("from", "UNIT"), ("into", "UNIT")),
    "shop.add": (("item", "GOOD"), ("qty", "NUMBER")),
    "facts.capital": (("of", "COUNTRY"), ("answer", "CAPITAL")),
    "stocks.price": (("symbol", "SYMBOL"),),
}
"""Of each function, its arguments in order: the canonical key, and what kind of value it takes."""

_NUMBER = "([2-9]|1[0-9]|20)"


def grammar(convention: Convention, functions: Sequence[str] = FUNCTIONS) -> str:
    """The calls of these functions in a convention, for `crayon_runtime.Constraint.lark`."""
    used = {kind for function in functions for _, kind in ARGUMENTS[function]}
    calls = "\n     | ".join(_call(function, convention) for function in functions)
    values = [f"{kind}: {text}" for kind, text in _values(convention.locale).items() if kind in used]
    return "\n".join([f"start: {calls}", *values]) + "\n"


def _call(function: str, convention: Convention) -> str:
    """Text and names of values in turns. A number is written as 2 is: some conventions do not quote it."""
    kinds = [kind for _, kind in ARGUMENTS[function]]
    arguments = [(key, "2" if kind == "NUMBER" else "?") for key, kind in ARGUMENTS[function]]
    symbols, text = [], ""
    for piece in write(function, arguments, convention):
        if piece.kind == "value":
            symbols += [json.dumps(text), kinds.pop(0)]
            text = ""
        else:
            text += piece.text
    return " ".join([*symbols, *([json.dumps(text)] if text else [])])


def _values(locale: Locale) -> dict[str, str]:
    """The terminal of each kind of value."""

    def words(choices: Iterable[str]) -> str:
        return " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))

    def translated(choices: Iterable[str]) -> str:
        return words(world.translate(choice, locale) for choice in choices)

    hour, half = (r"([1-9]|1[01])", r" [AP]M") if locale == "en" else (r"(0[1-9]|1[013-9]|2[0-3])", "")
    degrees = world.degrees(locale)
    return {
        "TIME": f"/{hour}:(00|15|30|45){half}/",
        "DAY": translated(world.DAYS),
        "NUMBER": f"/{_NUMBER}/",
        "SPAN": words(("min", "sec")),
        "PERSON": words(world.PEOPLE),
        "MESSAGE": words(world.MESSAGES),
        "GENRE": words(world.GENRES),
        "ROOM": translated(world.ROOMS),
        "PLACE": translated(world.PLACES),
        "MODE": translated(world.MODES),
        "EVENT": translated(world.EVENTS),
        "CITY": words(world.CITIES),
        "DEGREES": words([degrees]),
        "TEMPERATURE": f"/{_NUMBER} {degrees}/",
        "EXPRESSION": rf"/{_NUMBER} [-+*] {_NUMBER}/",
        "LANGUAGE": words(world.LANGUAGES),
        "FOREIGN": words(word for language in world.LEXICON.values() for word in language.values()),
        "UNIT": words(unit for pair in world.UNITS for unit in pair),
        "GOOD": translated(world.GOODS),
        "COUNTRY": words(world.CAPITALS),
        "CAPITAL": words(world.CAPITALS.values()),
        "SYMBOL": words(world.SYMBOLS.values()),
    }
