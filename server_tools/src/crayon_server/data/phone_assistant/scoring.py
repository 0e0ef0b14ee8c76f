"""Was it the right call? Exact match, intent and structure of a generated completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crayon_server.data.phone_assistant.conventions import meaning, read

if TYPE_CHECKING:
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
