"""Plain texts as one long row of tokens in a file, cut into sequences of equal length: what a model is pre-trained on.

Texts follow each other, each with the tokenizer's begin and an end of sequence, and a sequence may hold the end of one and the beginning
of the next; attention does not stop there. That is how GPT-2, LLaMA and MobileLLM are trained. A sequence begins with the last token of
the one before it, so that every token but the first of all is predicted exactly once in an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.errors import InvalidInput
from crayon_runtime.files import atomic_file
from crayon_server.sliced import Sliced
from crayon_server.training import Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

TYPE = np.dtype("<i4")
TOGETHER = 256
"""Texts that are tokenized at once."""


def write_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], path: Path) -> int:
    """Tokenize texts into a file of int32, little-endian; how many tokens it has is returned.

    Raises:
        OutputError: the file cannot be written.
    """
    count = 0
    with atomic_file(path) as file:
        for some in _together(texts):
            for ids in tokenizer(some, verbose=False)["input_ids"]:
                row = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
                file.write(np.array(row, TYPE).tobytes())
                count += len(row)
    return count


def _together(texts: Iterable[str]) -> Iterable[list[str]]:
    some: list[str] = []
    for text in texts:
        some.append(text)
        if len(some) == TOGETHER:
            yield some
            some = []
    if some:
        yield some


class Packed(Sliced[Tokens]):
    """The sequences of a file of `write_tokens`; nothing of it is in memory. The last one may be shorter.

    Args:
        length: tokens of a sequence, two at least.

    Raises:
        InvalidInput: the file has fewer than two tokens.
    """

    def __init__(self, path: Path, length: int) -> None:
        if path.stat().st_size < 2 * TYPE.itemsize:
            raise InvalidInput("there are no texts", where=path)
        self._ids, self._length = np.memmap(path, TYPE, "r"), length

    @property
    def digest(self) -> str:
        """SHA-256 over the tokens, in hex."""
        return hashlib.sha256(self._ids.data).hexdigest()

    def __len__(self) -> int:
        return -(-(len(self._ids) - 1) // (self._length - 1))

    def _at(self, i: int) -> Tokens:
        begin = i * (self._length - 1)
        ids = self._ids[begin : begin + self._length].tolist()
        return Tokens(ids, [True] * len(ids))
