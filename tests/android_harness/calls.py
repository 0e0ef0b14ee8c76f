"""Texts, and the calls that the phone-assistant benchmark reads in them: the app has to read the same."""

from __future__ import annotations

import itertools
import json
import random
from typing import TYPE_CHECKING

from crayon_server.data.phone_assistant import CONVENTIONS, read, stream, write
from crayon_server.data.phone_assistant.conventions import meaning
from crayon_server.data.phone_assistant.grammar import ARGUMENTS

if TYPE_CHECKING:
    from pathlib import Path

FUNCTIONS = {"alarm.set", "timer.start", "message.send", "music.play", "nav.route", "calendar.add"}
"""What the app can do."""


def write_cases(path: Path) -> None:
    """Calls of all conventions, and the same with a character less or one more."""
    draws = random.Random(7)
    texts = [example.completion for example in itertools.islice(stream("app"), 500)]
    for text in texts[:250]:
        at = draws.randrange(len(text))
        texts += [text[:at] + text[at + 1 :], text[:at] + draws.choice('=,()|:{}" x') + text[at:]]
    path.write_text(json.dumps([{"text": text} | _meant(text) for text in texts]))


def _meant(text: str) -> dict[str, object]:
    """The function and its arguments by canonical names, if writing the call in some convention gives the text."""
    call = read(text)
    function = meaning(call.function) if call else None
    if call and function in FUNCTIONS:
        keys = [key for key, _ in ARGUMENTS[function]]
        values = [value for _, value in call.arguments]
        arguments = list(zip(keys, values, strict=False))
        written = ("".join(piece.text for piece in write(function, arguments, c)) for c in CONVENTIONS)
        if len(keys) == len(values) and all(value.strip() for value in values) and text in written:
            return {"function": function, "arguments": dict(arguments)}
    return {"function": None, "arguments": {}}
