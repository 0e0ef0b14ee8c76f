"""What is answered: OpenAI's objects, whole and as chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from crayon_runtime.server.requests import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from crayon_runtime.generation import Generation, Piece
    from crayon_runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


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


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(Struct, frozen=True):
    """Of every token that was sampled, also of the one that ended the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: None = None


class AnswerMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


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


class _Reply(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Reply, frozen=True, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatCompletionChunk(_Reply, frozen=True, kw_only=True):
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
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
    """Writes one answer."""

    prefix: str

    def __init__(self, tokenizer: Tokenizer, model: str, fingerprint: str, *, logprobs: bool, usage: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._offset = 0
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def _texts(self, tokens: list[int]) -> list[str]:
        return [self._tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]


class ChatWriter(_Writer):
    """The objects of chat completions."""

    prefix = "chatcmpl"

    def whole(self, generation: Generation) -> ChatCompletion:
        logprobs = self._content(generation.token_ids, generation.log_probabilities)
        choice = ChatChoice(AnswerMessage(generation.text), _reason(generation), logprobs)
        return ChatCompletion(**self._head, choices=[choice], usage=Usage.of(generation))  # type: ignore[arg-type]

    def first(self) -> Iterator[bytes]:
        yield self._event([ChunkChoice(Delta("assistant", ""))])

    def piece(self, piece: Piece) -> Iterator[bytes]:
        if piece.text or self._logprobs:
            logprobs = self._content([piece.token_id], [piece.log_probability])
            yield self._event([ChunkChoice(Delta(content=piece.text), logprobs=logprobs)])

    def end(self, generation: Generation) -> Iterator[bytes]:
        yield self._event([ChunkChoice(Delta(), _reason(generation))])
        if self._usage:
            yield self._event([], Usage.of(generation))

    def _content(self, tokens: list[int], log_probabilities: list[float]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(
            [
                TokenLogprob(text, logprob, list(self._tokenizer.token_bytes(token)))
                for token, text, logprob in zip(tokens, self._texts(tokens), log_probabilities, strict=True)
            ]
        )

    def _event(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        told: Usage | UnsetType | None = usage if self._usage else UNSET
        return event(ChatCompletionChunk(**self._head, choices=choices, usage=told))  # type: ignore[arg-type]


class TextWriter(_Writer):
    """The objects of completions."""

    prefix = "cmpl"

    def whole(self, generation: Generation) -> Completion:
        logprobs = self._content(generation.token_ids, generation.log_probabilities)
        choice = TextChoice(generation.text, _reason(generation), logprobs)
        return Completion(**self._head, choices=[choice], usage=Usage.of(generation))  # type: ignore[arg-type]

    def first(self) -> Iterator[bytes]:
        yield from ()

    def piece(self, piece: Piece) -> Iterator[bytes]:
        if piece.text or self._logprobs:
            logprobs = self._content([piece.token_id], [piece.log_probability])
            yield self._event([TextChoice(piece.text, None, logprobs)])

    def end(self, generation: Generation) -> Iterator[bytes]:
        yield self._event([TextChoice("", _reason(generation))])
        if self._usage:
            yield self._event([], Usage.of(generation))

    def _content(self, tokens: list[int], log_probabilities: list[float]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        texts, offsets = self._texts(tokens), []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return TextLogprobs(texts, log_probabilities, offsets)

    def _event(self, choices: list[TextChoice], usage: Usage | None = None) -> bytes:
        told: Usage | UnsetType | None = usage if self._usage else UNSET
        return event(Completion(**self._head, choices=choices, usage=told))  # type: ignore[arg-type]


def writer(request: ChatRequest | CompletionRequest, tokenizer: Tokenizer, fingerprint: str) -> ChatWriter | TextWriter:
    """What writes the answer to a request."""
    kind = ChatWriter if isinstance(request, ChatRequest) else TextWriter
    return kind(tokenizer, request.model, fingerprint, logprobs=request.wants_logprobs, usage=request.include_usage)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _reason(generation: Generation) -> FinishReason:
    assert generation.finish_reason != "cancelled"
    return generation.finish_reason
