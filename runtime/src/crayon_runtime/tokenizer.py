"""Text to token ids and back, also one token at a time.

Every bundle carries a `tokenizer.json`, so the `tokenizers` library does the splitting. Decoding is done here, byte by byte: the library
turns a whole run of byte tokens into U+FFFD when one of them is invalid, so what it says of a text may change with its next token.
A stream cannot take back what it said. Decoding here follows UTF-8 alone: only the invalid bytes become U+FFFD (as Python's
`errors="replace"`), and a stream and `decode` always agree. For valid text they agree with the library too.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from crayon_runtime.chat_template import ChatTemplate, ControlTokens, Message, check_messages
from crayon_runtime.errors import BundleError, InvalidInput
from crayon_runtime.manifest import Tokenizer as Info

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of a bundle. Any number of threads may use it.

    Args:
        info: what the manifest says about it.
        path: its tokenizer.json.

    Raises:
        BundleError: the file is not a tokenizer.
    """

    def __init__(self, info: Info, path: Path) -> None:
        import tokenizers

        self.info = info
        try:
            document = path.read_bytes()
            self._library: Any = tokenizers.Tokenizer.from_buffer(document)
        except Exception as e:  # the library raises plain Exception
            raise BundleError(f"not a readable tokenizer.json: {e}", where=path, do="export the bundle again") from e
        self._library.no_truncation()
        self._library.no_padding()
        self._library.add_special_tokens(
            [
                tokenizers.AddedToken(text, special=True, normalized=False)
                for token in (info.bos, info.pad, *info.eos)
                if token is not None and (text := self._library.id_to_token(token)) is not None
            ]
        )
        self._control_ids: dict[str, int] = {
            token.content: id_ for id_, token in self._library.get_added_tokens_decoder().items() if token.special
        }
        self.special_ids = frozenset(self._control_ids.values())
        self._decoders = _decoder_types(document)
        self._bytes: dict[int, bytes] = {}
        self._encoding = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        return self.info.chat_template is not None

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
            add_bos: start with the bos token, if this model wants one.
            parse_special: read the text of control tokens (`</s>`) as those tokens. Never do that with text of others.

        Raises:
            InvalidInput: the text is not valid Unicode.
        """
        _check_unicode(text)
        with self._encoding:
            self._library.encode_special_tokens = not parse_special
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        bos = self.info.bos
        if add_bos and self.info.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD. Ids that the tokenizer does not know have no text."""
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    @property
    def takes_calls(self) -> bool:
        """Whether the chat template writes calls of tools, and their results."""
        return self._template is not None and self._template.takes_calls

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of a conversation, bos included where the template writes it.

        Text in a message that imitates a control token is encoded as the plain text that it is.

        Args:
            messages: each with a "role" and a "content".
            tools: to tell the model of, in OpenAI's form. A template that knows no tools leaves them out.
            add_generation_prompt: end with what opens the assistant's answer.

        Raises:
            InvalidInput: there is no template, or it refuses these messages.
        """
        marked, marked_tools = self._control.mark(messages), self._control.mark(tools)
        text = self.render_chat(marked, tools=marked_tools, add_generation_prompt=add_generation_prompt)
        if marked == list(messages) and marked_tools == (
            tools and list(tools)
        ):  # nothing imitates anything: the library knows best how to split
            return self.encode(text, add_bos=False, parse_special=True)
        ids: list[int] = []
        for piece, is_token in self._control.split(text):
            ids += [self._control_ids[piece]] if is_token else self.encode(piece, add_bos=False)
        return ids

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation as the template writes it, in which nothing tells its control tokens from a message's text.

        Raises:
            InvalidInput: as `apply_chat_template`, which is for text of others.
        """
        if self._template is None:
            raise InvalidInput(
                "this bundle has no chat template",
                do="give the prompt as text, or export from a model whose tokenizer_config.json has a chat_template",
            )
        check_messages(messages)
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The UTF-8 bytes that a token stands for; at the start of a text (`first`) some tokenizers drop a space."""
        if first:
            return self._token_bytes(token, first=True)
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._token_bytes(token, first=False)
        return found

    def _token_bytes(self, token: int, *, first: bool) -> bytes:
        name = self._library.id_to_token(token) if token >= 0 else None
        if name is None:
            return b""
        if "ByteLevel" in self._decoders:
            try:
                return bytes(_BYTE_LEVEL[character] for character in name)
            except KeyError:  # an added token
                return bytes(name, "utf-8")
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte and "ByteFallback" in self._decoders and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        text: str = self._library.decode([token], skip_special_tokens=False)
        if not first:  # what the token adds after another one: here after itself
            text = self._library.decode([token, token], skip_special_tokens=False)[len(text) :]
        return text.encode()

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self._control_ids)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        if self.info.chat_template is None:
            return None
        ids = {"bos_token": self.info.bos, "eos_token": next(iter(self.info.eos), None), "pad_token": self.info.pad}
        names = {name: self._library.id_to_token(id_) or "" for name, id_ in ids.items() if id_ is not None}
        return ChatTemplate(self.info.chat_template, names)


class StreamDecoder:
    """Decodes token by token, and never hands out part of a UTF-8 character.

    All pieces and the flush together are `tokenizer.decode` of all tokens.

    Args:
        continues: the tokens follow others, so that a space at their beginning is one, which sentencepiece's tokenizers would drop
            at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not continues

    def push(self, token: int) -> str:
        """The text that is complete with this token: often its own, empty in the middle of a character."""
        if token in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token, first=self._first)
        self._first = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD if it stops in the middle of a character."""
        return self._utf8.decode(b"", final=True)


def _check_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise InvalidInput(f"a text is wanted, not {type(text).__name__}", where="prompt")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidInput(
            f"the text is not valid Unicode: character {e.start} is a lone surrogate",
            where="prompt",
            do="it was probably read from bytes that are not UTF-8; convert them to UTF-8 first",
        ) from None


class _Document(msgspec.Struct):
    decoder: dict[str, Any] | None = None


def _decoder_types(document: bytes) -> set[str]:
    """The steps of a tokenizer.json's decoder, by type; the vocabulary is not parsed."""
    decoder = msgspec.json.decode(document, type=_Document).decoder or {}
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
