"""Chat templates: from messages to the text that a model was trained on.

The conventions are those of transformers' `apply_chat_template`: Jinja in an immutable sandbox with `trim_blocks`, `lstrip_blocks`
and loop controls, and `raise_exception`, `strftime_now` and an unescaped `tojson`. A template comes with a model, so it is foreign code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crayon_runtime.errors import BundleError, InvalidInput

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""A "role" and a "content", and whatever else the template reads."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja.
        names: texts that the template knows by name: `bos_token`, `eos_token`, `pad_token`.

    Raises:
        BundleError: it is not valid Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        import jinja2

        self._names = names
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as e:
            raise BundleError(
                f"the chat template is not valid: {e}",
                where="manifest.json: tokenizer.chat_template",
                do="correct it in the source model's tokenizer_config.json and export again",
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation; InvalidInput if the template refuses it."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._names,
            )
        except Exception as e:  # a template can raise anything: it is a program
            raise InvalidInput(
                f"the chat template refuses these messages: {e}",
                where="messages",
                do="most templates want user and assistant in turn, with an optional system message before them",
            ) from e

    @cached_property
    def takes_calls(self) -> bool:
        """Whether it writes calls of tools, and their results. Found out by trying: there is no declaration."""
        function = {"name": "calledname", "arguments": {"key": "calledvalue"}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        try:
            text = self.render(
                [
                    {"role": "user", "content": "asked"},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": "toolresult", "tool_call_id": call["id"]},
                ],
                add_generation_prompt=True,
            )
        except InvalidInput:
            return False
        return all(part in text for part in ("calledname", "calledvalue", "toolresult"))


def check_messages(messages: Sequence[Message]) -> None:
    """InvalidInput unless there are messages, each with a role and a content that are text."""
    if isinstance(messages, str | bytes | Mapping) or not messages:
        raise InvalidInput("there are no messages", do='pass a list such as [{"role": "user", "content": "Hello"}]')
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise InvalidInput(f"message {i} has no {key} that is text", where="messages")


class ControlTokens:
    """Tells the control tokens that a template wrote from text in a message that only looks like them.

    Such imitations are wrapped into a pair of private-use characters before rendering (as transformers does it, and with the
    same characters), so that they can be told apart whatever the template does around them.
    """

    START, END = "\U000f0000", "\U000f0001"

    def __init__(self, texts: Iterable[str]) -> None:
        either = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"
        self._token = re.compile(either)
        self._marked_or_token = re.compile(f"{self.START}(?:{either}){self.END}|({either})")

    def mark(self, value: Any) -> Any:
        """A copy of messages in which every imitation is marked. Marks that were there before are taken out."""
        if isinstance(value, str):
            return self._token.sub(rf"{self.START}\g<0>{self.END}", self.unmark(value))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(inner) for inner in value]
        return value

    def unmark(self, text: str) -> str:
        return text.replace(self.START, "").replace(self.END, "")

    def split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Cut at the template's own control tokens: (text without marks, whether it is such a token)."""
        start = 0
        for match in self._marked_or_token.finditer(rendered):
            if match[1] is not None:
                yield self.unmark(rendered[start : match.start()]), False
                yield match[1], True
                start = match.end()
        yield self.unmark(rendered[start:]), False


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model is trained to say; here it has no effect."""

        tags = {"generation"}  # noqa: RUF012, Jinja's interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
