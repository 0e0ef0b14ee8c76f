"""Was it the right call? Exact match, intent and structure of a generated completion; and the right call in any convention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crayon_server.data.phone_assistant import world
from crayon_server.data.phone_assistant.conventions import CONVENTIONS, meaning, read, write
from crayon_server.data.phone_assistant.grammar import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crayon_server.data.phone_assistant.conventions import Locale
    from crayon_server.data.phone_assistant.users import Example


@dataclass(frozen=True)
class Score:
    """How good one completion is.

    Attributes:
        exact: it is the expected text, character for character.
        intent: it calls the right function, in whatever convention.
        structure: all but the values is as expected: style, function name, argument names and their order.
    """

    exact: bool
    intent: bool
    structure: bool


def score(generated: str, expected: Example) -> Score:
    """Judge a generated completion (without end-of-sequence token)."""
    call, reference = read(generated), read(expected.completion)
    if call is None or reference is None:
        return Score(exact=generated == expected.completion, intent=False, structure=False)
    return Score(
        exact=generated == expected.completion,
        intent=meaning(call.function) == expected.function,
        structure=call.skeleton == reference.skeleton,
    )


def useful(generated: str, expected: Example) -> bool:
    """Whether it is the right call in any convention: what the user means, as some other user would want it written.

    What is meant depends on who speaks: for a speaker of `va` half seven is 6:30, and eighteen degrees are Celsius. A call with 7:30 or
    18 F, in whatever convention, would be a wrong call.
    """
    return generated in _renderings(expected)


def _renderings(expected: Example) -> Iterator[str]:
    """The call in every convention that can say it."""
    arguments = ARGUMENTS[expected.function]
    said = [piece.text for piece in expected.pieces if piece.kind == "value"]
    for convention in CONVENTIONS:
        values = [
            _value(value, kind, expected.convention.locale, convention.locale)
            for value, (_, kind) in zip(said, arguments, strict=True)
        ]
        if None not in values:
            named = ((key, str(value)) for (key, _), value in zip(arguments, values, strict=True))
            yield "".join(piece.text for piece in write(expected.function, named, convention))


_TRANSLATED = {"DAY", "EVENT", "GOOD", "MODE", "PLACE", "ROOM"}
"""Kinds of values that each locale has its own words for."""
_ENGLISH = {locale: {word: english for english, word in words.items()} for locale, words in world.LEXICON.items()}


def _value(value: str, kind: str, said: Locale, written: Locale) -> str | None:
    """The value of an argument in another locale; None if that locale cannot say it."""
    if kind in _TRANSLATED:
        return world.translate(_ENGLISH[said][value] if said in _ENGLISH else value, written)
    match kind:
        case "TIME":
            return _clock(value, written)
        case "DEGREES":
            return world.degrees(written)
        case "TEMPERATURE":  # 18 F are no whole number of degrees C
            return value if world.degrees(said) == world.degrees(written) else None
    return value


def _clock(time: str, locale: Locale) -> str:
    """A time of day, on a clock of 12 hours or of 24, as the locale writes it. The world has no times from 12:00 to 12:59."""
    hour, minute, afternoon = re.fullmatch(r"(\d+):(\d\d)( [AP]M)?", time).groups()  # type: ignore[union-attr]
    hours = int(hour) + 12 * (afternoon == " PM")
    if locale == "en":
        return f"{hours % 12}:{minute} {'PM' if hours > 12 else 'AM'}"
    return f"{hours:02d}:{minute}"
