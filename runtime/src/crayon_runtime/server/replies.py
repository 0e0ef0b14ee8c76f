"""What is answered: OpenAI's objects, whole and as chunks of a stream. What answers of the model `hybrid` tell beyond them is in `crayon`."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from crayon_runtime.generation import Piece
from crayon_runtime.server.errors import Refused
from crayon_runtime.server.tools import AnswerReader, Call, CalledFunction, CallPart

if TYPE_CHECKING:
    from crayon_runtime.generation import Generation
    from crayon_runtime.routing.policies import Route
    from crayon_runtime.routing.router import Answer, Part
    from crayon_runtime.server.requests import ChatRequest, CompletionRequest
    from crayon_runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, generation: Generation) -> Usage:
        prompt, answer = generation.prompt_tokens, generation.generated_tokens
        return cls(prompt, answer, prompt + answer, CachedTokens(generation.reused_tokens))

    @classmethod
    def of_routed(cls, answer: Answer) -> Usage:
        """The prompt's tokens are the device's; 0 if it did not begin. The answer's are those of who gave it."""
        device = answer.generation
        prompt, reused = (device.prompt_tokens, device.reused_tokens) if device else (0, 0)
        given = answer.server_tokens if answer.route == "server" else device.generated_tokens if device else 0
        return cls(prompt, given, prompt + given, CachedTokens(reused))


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Of every token that was sampled, also of the one that ended the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: list[dict[str, float]] | None
    """By the token's text; of what is no text, by "bytes:\\xe6"."""


class AnswerMessage(Struct, frozen=True):
    content: str | None
    tool_calls: list[Call] | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallPart] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    index: Literal[0] = 0


class ChunkChoice(Struct, frozen=True):
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    index: Literal[0] = 0


class TextChoice(Struct, frozen=True):
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    index: Literal[0] = 0


class Routed(Struct, frozen=True):
    """Who gave an answer, and why; see `crayon_runtime.routing.router.Answer`. What is not a number is null."""

    route: Literal["device", "server"]
    reason: str
    score: float | None
    threshold: float | None
    policy: str
    signals: dict[str, float | None]
    seconds: dict[str, float]
    fallback: bool
    server_tokens: int
    sent_bytes: int

    @classmethod
    def of(cls, answer: Answer) -> Routed:
        signals = {name: _number(value) for name, value in answer.signals.items()}
        return cls(
            route=answer.route,
            reason=answer.reason,
            score=_number(answer.score),
            threshold=_number(answer.threshold),
            policy=answer.policy,
            signals=signals,
            seconds=answer.seconds,
            fallback=answer.fallback,
            server_tokens=answer.server_tokens,
            sent_bytes=answer.sent_bytes,
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Draft(Struct, frozen=True):
    """What the device says, and may take back."""

    draft: str


class Restart(Struct, frozen=True):
    """The server broke off, and the device answers from the beginning."""

    restart: Literal[True] = True


class _Reply(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Reply, frozen=True, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    crayon: Routed | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatCompletionChunk(_Reply, frozen=True, kw_only=True):
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    crayon: Struct | UnsetType = UNSET
    """`Routed` with the finish reason, and before `Draft` and `Restart`."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Completion(_Reply, frozen=True, kw_only=True):
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class Embedding(Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Model(Struct, frozen=True):
    id: str
    created: int
    parent: str | None
    """The base of an adapter."""
    object: Literal["model"] = "model"
    owned_by: Literal["crayon"] = "crayon"


class ModelList(Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class _Writer:
    """Writes one answer.

    Args:
        top: of how many of the most likely tokens to tell the log-probabilities; None: of no tokens at all.
        usage: a stream ends with it.
    """

    prefix: str

    def __init__(self, tokenizer: Tokenizer, model: str, fingerprint: str, *, top: int | None, usage: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._usage = usage
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


class ChatWriter(_Writer):
    """The objects of chat completions.

    Args:
        calls: the answer may be a call of a tool.
    """

    prefix = "chatcmpl"

    def __init__(self, *args: Any, calls: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._reader = AnswerReader(calls=calls)

    def whole(self, generation: Generation) -> ChatCompletion:
        choice = ChatChoice(
            self._message(generation.text), self._reason(generation), self._logprobs(_tokens(generation))
        )
        return ChatCompletion(**self._head, choices=[choice], usage=Usage.of(generation))  # type: ignore[arg-type]

    def first(self) -> Iterator[bytes]:
        yield self._event([ChunkChoice(Delta("assistant", ""))])

    def events(self, item: Piece | Generation) -> Iterator[bytes]:
        yield from self._piece(item) if isinstance(item, Piece) else self._end(item)

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        deltas = [_delta(part) for part in self._reader.push(piece.text)]
        logprobs = self._logprobs([piece[1:]])
        if logprobs and not deltas:
            deltas = [Delta(content="")]
        for delta in deltas:
            yield self._event([ChunkChoice(delta, logprobs=logprobs)])
            logprobs = None

    def _end(self, generation: Generation) -> Iterator[bytes]:
        for text in self._reader.flush():
            yield self._event([ChunkChoice(_delta(text))])
        yield self._event([ChunkChoice(Delta(), self._reason(generation))])
        if self._usage:
            yield self._event([], Usage.of(generation))

    def _message(self, text: str) -> AnswerMessage:
        parts = [*self._reader.push(text), *self._reader.flush()]
        calls = [part for part in parts if isinstance(part, CallPart)]
        if not calls:
            return AnswerMessage("".join(part for part in parts if isinstance(part, str)))
        name, arguments = str(calls[0].function.name), "".join(call.function.arguments for call in calls)
        return AnswerMessage(None, [Call(str(calls[0].id), "function", CalledFunction(name, arguments))])

    def _reason(self, generation: Generation) -> FinishReason:
        return "tool_calls" if self._reader.whole else _reason(generation)

    def _logprobs(self, tokens: Iterable[_Token]) -> ChatLogprobs | None:
        if self._top is None:
            return None

        def top(token: int, logprob: float) -> TopLogprob:
            return TopLogprob(self._text(token), logprob, list(self._tokenizer.token_bytes(token)))

        return ChatLogprobs(
            [
                TokenLogprob(
                    self._text(token),
                    logprob,
                    list(self._tokenizer.token_bytes(token)),
                    [top(*each) for each in likely],
                )
                for token, logprob, likely in tokens
            ]
        )

    def _event(
        self, choices: list[ChunkChoice], usage: Usage | None = None, crayon: Struct | UnsetType = UNSET
    ) -> bytes:
        told: Usage | UnsetType | None = usage if self._usage else UNSET
        return event(ChatCompletionChunk(**self._head, choices=choices, usage=told, crayon=crayon))  # type: ignore[arg-type]


class HybridWriter(ChatWriter):
    """The objects of chat completions that a router gives.

    Args:
        drafts: a stream shows them.
    """

    def __init__(self, *args: Any, drafts: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._drafts = drafts
        self._source: Route = "device"
        self._said = False

    def whole(self, answer: Answer) -> ChatCompletion:  # type: ignore[override]
        choice = ChatChoice(self._message(answer.text), self._why(answer))
        return ChatCompletion(
            **self._head,  # type: ignore[arg-type]
            choices=[choice],
            usage=Usage.of_routed(answer),
            crayon=Routed.of(answer),
        )

    def events(self, item: Part | Answer) -> Iterator[bytes]:  # type: ignore[override]
        if not isinstance(item, tuple):
            yield from self._last(item)
        elif not item.draft:
            yield from self._stays(item)
        elif self._drafts:
            yield self._event([], crayon=Draft(item.text))

    def _stays(self, part: Part) -> Iterator[bytes]:
        if self._said and self._source == "server" and part.source == "device":
            yield self._event([ChunkChoice(Delta(content="\n\n"))], crayon=Restart())
        self._source, self._said = part.source, True
        for delta in self._reader.push(part.text):
            yield self._event([ChunkChoice(_delta(delta))])

    def _last(self, answer: Answer) -> Iterator[bytes]:
        for text in self._reader.flush():
            yield self._event([ChunkChoice(_delta(text))])
        yield self._event([ChunkChoice(Delta(), self._why(answer))], crayon=Routed.of(answer))
        if self._usage:
            yield self._event([], Usage.of_routed(answer))

    def _why(self, answer: Answer) -> FinishReason:
        """A server may say anything; what is not a limit is an end."""
        if self._reader.whole:
            return "tool_calls"
        return "length" if answer.finish_reason == "length" else "stop"


class TextWriter(_Writer):
    """The objects of completions."""

    prefix = "cmpl"
    _offset = 0

    def whole(self, generation: Generation) -> Completion:
        choice = TextChoice(generation.text, _reason(generation), self._logprobs(_tokens(generation)))
        return Completion(**self._head, choices=[choice], usage=Usage.of(generation))  # type: ignore[arg-type]

    def first(self) -> Iterator[bytes]:
        yield from ()

    def events(self, item: Piece | Generation) -> Iterator[bytes]:
        yield from self._piece(item) if isinstance(item, Piece) else self._end(item)

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        logprobs = self._logprobs([piece[1:]])
        if piece.text or logprobs:
            yield self._event([TextChoice(piece.text, None, logprobs)])

    def _end(self, generation: Generation) -> Iterator[bytes]:
        yield self._event([TextChoice("", _reason(generation))])
        if self._usage:
            yield self._event([], Usage.of(generation))

    def _logprobs(self, tokens: Iterable[_Token]) -> TextLogprobs | None:
        if self._top is None:
            return None
        told = TextLogprobs([], [], [], [] if self._top else None)
        for token, logprob, likely in tokens:
            told.tokens.append(self._told(token))
            told.token_logprobs.append(logprob)
            told.text_offset.append(self._offset)
            self._offset += len(self._text(token))
            if told.top_logprobs is not None:  # with the token that was sampled, wherever it stands
                told.top_logprobs.append({self._told(each): value for each, value in (*likely, (token, logprob))})
        return told

    def _told(self, token: int) -> str:
        """Its text, or, of a part of a character, its bytes: then several tokens would have one name."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _event(self, choices: list[TextChoice], usage: Usage | None = None) -> bytes:
        told: Usage | UnsetType | None = usage if self._usage else UNSET
        return event(Completion(**self._head, choices=choices, usage=told))  # type: ignore[arg-type]


def text_writer(request: CompletionRequest, tokenizer: Tokenizer, fingerprint: str) -> TextWriter:
    """What writes the answer to a request."""
    return TextWriter(tokenizer, request.model, fingerprint, top=request.top, usage=request.include_usage)


def chat_writer(request: ChatRequest, tokenizer: Tokenizer, fingerprint: str, *, hybrid: bool) -> ChatWriter:
    """What writes the answer to a request.

    Raises:
        Refused: it asks for what a server LLM does not tell.
    """
    calls = request.wanted is not None and request.wanted.kind == "tools"
    head = (tokenizer, request.model, fingerprint)
    if not hybrid:
        return ChatWriter(*head, top=request.top, usage=request.include_usage, calls=calls)
    if request.top is not None:
        message = "answers of `hybrid` have no log-probabilities: leave `logprobs` out, or ask another model"
        raise Refused(400, message, param="logprobs", code="unsupported_parameter")
    drafts = bool(request.crayon and request.crayon.drafts)
    return HybridWriter(*head, top=None, usage=request.include_usage, calls=calls, drafts=drafts)


_Token = tuple[int, float, Sequence[tuple[int, float]]]
"""Its id, its log-probability, and those of the most likely ones in its place."""


def _tokens(generation: Generation) -> Iterable[_Token]:
    return zip(generation.token_ids, generation.log_probabilities, generation.top_log_probabilities, strict=True)


def _delta(part: str | CallPart) -> Delta:
    return Delta(content=part) if isinstance(part, str) else Delta(tool_calls=[part])


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _reason(generation: Generation) -> FinishReason:
    assert generation.finish_reason != "cancelled"
    return generation.finish_reason
