"""What may be asked: OpenAI's request bodies, as far as a model on a device can serve them.

A field that would change the answer and is not supported may be sent with the value that changes nothing, and is refused with any other;
a field that is not known is refused too, so that nothing that was asked for is silently left out. Beyond OpenAI's fields there are
`top_k`, `min_p`, `repetition_penalty`, and `crayon` for the model `hybrid`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from crayon_runtime.errors import InvalidInput
from crayon_runtime.request import prompt_ids
from crayon_runtime.server.errors import Refused
from crayon_runtime.server.tools import Call, Tool, ToolChoice, Wanted, choose

if TYPE_CHECKING:
    from crayon_runtime.generation import GenerateOptions
    from crayon_runtime.tokenizer import Tokenizer

LOWEST_TEMPERATURE = 0.001
"""Below this, sampling is greedy."""

_Text = Annotated[str, Meta(min_length=1)]
_Zero = Annotated[float, Meta(ge=0, le=0)]
_Fraction = Annotated[float, Meta(ge=0, le=1)]
_No = Annotated[bool, Meta(extra_json_schema={"const": False})]
_Nothing = Annotated[list[Any], Meta(max_length=0)]
_Seed = Annotated[
    int, Meta(extra_json_schema={"minimum": -(2**53), "maximum": 2**53})
]  # what every JSON writer writes exactly
_Count = Annotated[int, Meta(ge=1, le=2**31)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False
    """Against listeners on a network, who are not on this one; ignored."""


class TextFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    pass


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(max_length=64)]
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None
    """What is false in OpenAI's protocol may be disobeyed; here nothing is."""


class JsonSchemaFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role"):
    content: str | list[TextPart]

    def to_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        return {"role": self.__struct_config__.tag, "content": _joined(self.content)}


class SystemMessage(_Message, frozen=True, forbid_unknown_fields=True, tag="system"):
    pass


class DeveloperMessage(_Message, frozen=True, forbid_unknown_fields=True, tag="developer"):
    """What OpenAI calls the system now."""

    def to_dict(self) -> dict[str, Any]:
        return {"role": "system", "content": _joined(self.content)}


class UserMessage(_Message, frozen=True, forbid_unknown_fields=True, tag="user"):
    pass


class AssistantMessage(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """What was answered before. What only OpenAI's answers have is accepted empty, so that an answer can be sent back as it came."""

    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None
    annotations: _Nothing | None = None
    audio: None = None
    function_call: None = None

    def to_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        if self.content is None and not self.tool_calls:
            raise InvalidInput("a message of the assistant has neither content nor tool_calls", where="messages")
        calls = {"tool_calls": [call.to_dict() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": _joined(self.content or ""), **calls}


class ToolMessage(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    """What a call came to."""

    content: str | list[TextPart]
    tool_call_id: str

    def to_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        return {"role": "tool", "content": _joined(self.content), "tool_call_id": self.tool_call_id}


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Sampled(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of completion take."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: _Fraction | None = None
    seed: _Seed | None = None
    stop: _Text | Annotated[list[_Text], Meta(max_length=4)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    min_p: _Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None

    n: Literal[1] | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=0)] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wanted(self) -> Wanted | None:
        """What the answer must be; None: any text."""
        return None

    @property
    def top(self) -> int | None:
        """Of how many of the most likely tokens to tell the log-probabilities; None: not even of those that were sampled."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, defaults: GenerateOptions) -> GenerateOptions:
        """For the engine: what was asked for, and the defaults for what was not."""
        asked = {
            "max_new_tokens": self.limit,
            "temperature": self.temperature
            if (self.temperature or 0) >= LOWEST_TEMPERATURE
            else self.temperature and 0.0,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed if self.seed is None else self.seed % 2**64,
            "stop": self.stop,
            "top_log_probabilities": self.top,
        }
        return {**defaults, **{name: value for name, value in asked.items() if value is not None}}  # type: ignore[typeddict-item]


class CrayonOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """For the model `hybrid`."""

    drafts: bool | None = False
    """Stream what the device says before it is known whether that stays: chunks without choices, with `crayon.draft`."""


class ChatRequest(Sampled, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = False

    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may call several tools; here it never does."""
    functions: _Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    store: _No | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    crayon: CrayonOptions | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def query(self) -> str:
        """What a server LLM is asked: the last message of the user, without anything around it."""
        asked = [message.to_dict()["content"] for message in self.messages if isinstance(message, UserMessage)]
        return asked[-1].strip() if asked else ""

    @property
    def wanted(self) -> Wanted | None:
        tools = choose(self.tools, self.tool_choice)
        match self.response_format:
            case JsonObjectFormat():
                schema = '{"type": "object"}'
            case JsonSchemaFormat(json_schema=wanted):
                schema = msgspec.json.encode(wanted.schema).decode()
            case _:
                return tools
        if tools:
            message = (
                'an answer is a call or meets a schema, not either: leave one of them out, or send tool_choice "none"'
            )
            raise Refused(400, message, param="response_format")
        return Wanted("response_format", schema)

    @property
    def top(self) -> int | None:
        return self.top_logprobs or (0 if self.logprobs else None)

    def ids(self, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
        """The prompt. Without a chat template it is the one message there is, to be continued as it is.

        Raises:
            InvalidInput: the template refuses the conversation, or there is none.
        """
        messages = [message.to_dict() for message in self.messages]
        if tokenizer.has_chat_template:
            calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
            if calls and not tokenizer.takes_calls:
                raise InvalidInput(
                    "this model's chat template knows no calls of tools",
                    where="messages",
                    do="tell what a tool answered in a message of the user",
                )
            tools = [tool.to_dict() for tool in self.tools or ()] if self.tool_choice != "none" else []
            return tokenizer.apply_chat_template(messages, tools=tools or None)
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise InvalidInput(
                "this model has no chat template, so it knows no conversation",
                where="messages",
                do="send one message of the user, which is completed as it is, or use /v1/completions",
            )
        return _list(messages[0]["content"], tokenizer, vocab_size)


class CompletionRequest(Sampled, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: _Text | Annotated[list[int | str], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    """0: of the tokens that were sampled; above: of so many of the most likely ones, too."""

    suffix: Annotated[str, Meta(max_length=0)] | None = None
    echo: _No | None = None
    best_of: Literal[1] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def ids(self, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
        """The prompt: a text, alone or in a list, or token ids, which are fed as they are."""
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if not isinstance(prompt, str) and any(isinstance(token, str) for token in prompt):
            raise InvalidInput("a prompt is one text, or token ids", where="prompt", do="send a request for each text")
        return _list(prompt, tokenizer, vocab_size)  # type: ignore[arg-type]


class EmbeddingRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/embeddings."""

    model: str
    input: _Text | Annotated[list[_Text], Meta(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


Body = TypeVar("Body", bound=Struct)

_PATH = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.S)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.S)
_UNSUPPORTED = re.compile(
    r"n|frequency_penalty|presence_penalty|logit_bias|response_format\b.*|tools\[.*\]\.type|tool_choice|functions|function_call"
    r"|modalities\b.*|audio|prediction|reasoning_effort|verbosity|web_search_options|store|service_tier|suffix|echo|best_of|dimensions"
    r"|messages\[.*\]\.(content\[.*\]\.type|refusal|audio|function_call|annotations)"
)


def parse(body: bytes, kind: type[Body]) -> Body:
    """A request body.

    Raises:
        Refused: it is not one.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        raise _invalid(str(e)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refused(400, "the body is not JSON; NaN and infinity are not") from None
    for name in ("store", "echo"):
        if getattr(request, name, None):
            raise _unsupported(name)
    return request


def _invalid(text: str) -> Refused:
    found = _PATH.fullmatch(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    unknown = _UNKNOWN.fullmatch(what)
    if unknown:
        name = f"{path}.{unknown['name']}" if path else unknown["name"]
        return Refused(400, f"this server does not know `{name}`", param=name, code="unknown_parameter")
    if _UNSUPPORTED.fullmatch(path):
        return _unsupported(path)
    return Refused(400, f"{path}: {what}" if path else what, param=path or None)


def _unsupported(name: str) -> Refused:
    message = f"this server does not support that value of `{name}`: leave it out"
    return Refused(400, message, param=name, code="unsupported_parameter")


def _list(prompt: str | Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    ids: list[int] = prompt_ids(prompt, tokenizer, vocab_size).tolist()
    return ids


def components(types: Sequence[type]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of types, by name."""
    return msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")[1]
