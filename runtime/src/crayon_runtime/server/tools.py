"""Tools that a request offers, what an answer may then be, and the call in what a model says.

A model that calls a tool says `{"name": "alarm.set", "arguments": {"day": "monday"}}`, and nothing else: a constraint holds it to that.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from crayon_runtime.errors import InvalidInput, MissingExtra
from crayon_runtime.server.errors import Refused

if TYPE_CHECKING:
    from crayon_runtime.constraint import Constraint

COMPILED = 32
"""Constraints that are kept for further requests: to make one takes as long as several tokens."""

_Name = Annotated[str, Meta(min_length=1, max_length=64)]


class Function(Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments; None: there are none."""
    strict: bool | None = None
    """What is false in OpenAI's protocol may be disobeyed; here nothing is."""


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    """What a model may call."""

    type: Literal["function"]
    function: Function

    def to_dict(self) -> dict[str, Any]:
        """As chat templates and constraints want it: without what was not said."""
        function = {name: value for name, value in msgspec.structs.asdict(self.function).items() if value is not None}
        return {"type": self.type, "function": function}


class FunctionName(Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True):
    """The one tool to call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str
    """JSON."""


class Call(Struct, frozen=True, forbid_unknown_fields=True):
    """A call of a tool: in an answer, and in the message that sends it back."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def to_dict(self) -> dict[str, Any]:
        """As chat templates want it, which write the arguments in their own way.

        Raises:
            InvalidInput: the arguments are not a JSON object.
        """
        try:
            arguments = msgspec.json.decode(self.function.arguments, type=dict[str, Any])
        except (ValueError, RecursionError):  # also msgspec's
            raise InvalidInput(
                f"the arguments of the call {self.id!r} are not a JSON object", where="messages"
            ) from None
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class CalledPart(Struct, frozen=True, omit_defaults=True):
    arguments: str
    name: str | UnsetType = UNSET


class CallPart(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a call; only the first one has an id and a name."""

    index: int
    function: CalledPart
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Wanted(NamedTuple):
    """What an answer must be, as a key of what is compiled."""

    kind: Literal["response_format", "tools"]
    text: str
    """JSON: a schema, or tools."""
    or_text: bool = False
    """The model may answer with text, too, instead of calling one of the tools."""


def choose(tools: list[Tool] | None, choice: ToolChoice | None) -> Wanted | None:
    """What an answer must be where tools were offered; None: any text.

    Raises:
        Refused: the choice is of a tool that was not offered.
    """
    if isinstance(choice, NamedTool):
        chosen = [tool for tool in tools or () if tool.function.name == choice.function.name]
        if not chosen:
            raise Refused(400, f"no tool has the name {choice.function.name!r}", param="tool_choice")
        tools = chosen
    elif not tools:
        if choice == "required":
            raise Refused(400, "a call is required, and there are no tools", param="tool_choice")
        return None
    elif choice == "none":
        return None
    text = msgspec.json.encode([tool.to_dict() for tool in tools]).decode()
    return Wanted("tools", text, or_text=choice in (None, "auto"))


@functools.lru_cache(maxsize=COMPILED)
def constraint(wanted: Wanted) -> Constraint:
    """What holds an answer to it.

    Raises:
        InvalidInput: it cannot be enforced.
        Refused: the extra is not installed.
    """
    from crayon_runtime.constraint import Constraint

    try:
        if wanted.kind == "response_format":
            return Constraint.json_schema(wanted.text)
        return Constraint.tools(json.loads(wanted.text), or_text=wanted.or_text)
    except MissingExtra as e:
        raise Refused(400, f"{e.what}; {e.do}", param=wanted.kind, code="unsupported_parameter") from None


class AnswerReader:
    """Tells, piece by piece, what an answer is: text, or the call of a tool.

    Args:
        calls: it may be a call: then it begins with a brace, and text does not.
    """

    def __init__(self, *, calls: bool) -> None:
        self.name: str | None = None
        """Of the tool that is called, as soon as it is there."""
        self.whole = False
        """Whether a call was read to its end."""
        self._may_call = calls
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> Iterator[str | CallPart]:
        """What a piece adds: text, or parts of the call."""
        if self.name is not None:
            yield from self._arguments(text)
        elif not self._may_call:
            yield from [text] if text else []
        else:
            self._held += text
            yield from self._begin()

    def flush(self) -> Iterator[str]:
        """What was held back when the answer ends: blanks, or the beginning of a call that nobody can read."""
        if self._held:
            yield self._held

    def _begin(self) -> Iterator[str | CallPart]:
        if call := _CALL.match(self._held):
            rest, self._held = self._held[call.end() :], ""
            self.name = str(json.loads(call["name"]))
            first = CalledPart("", self.name)
            yield CallPart(0, first, new_id(), "function")
            yield from self._arguments(rest)
        elif (said := self._held.lstrip(" \t\r\n")) and not said.startswith("{"):
            self._may_call = False
            held, self._held = self._held, ""
            yield held

    def _arguments(self, text: str) -> Iterator[CallPart]:
        """Up to the brace that closes them; what follows closes the call."""
        end = (
            0 if self.whole else next((i for i, character in enumerate(text, 1) if self._closes(character)), len(text))
        )
        if end:
            yield CallPart(0, CalledPart(text[:end]))

    def _closes(self, character: str) -> bool:
        """Follow one character of the arguments; True: it is their last one."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "]}")
            self.whole = self._depth == 0
        return self.whole


_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


def new_id() -> str:
    """Nine letters and digits, which is what Mistral's chat templates insist on."""
    return secrets.token_hex(5)[:9]
