"""Plain texts as sequences of tokens: nothing is lost, nothing comes twice, whatever their lengths are."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crayon_runtime.errors import InvalidInput
from crayon_server import models
from tests.support import needs

np = needs.module("numpy")
needs.module("torch")

from crayon_server.packing import TOGETHER, Packed, write_tokens  # noqa: E402 - it needs them


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(models.load_nano())


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packed") / "tokens"


@given(st.lists(st.integers(0, 639), min_size=2, max_size=200), st.integers(2, 40))
@settings(deadline=None, max_examples=100)
def test_every_token_but_the_first_is_predicted_once_from_what_precedes_it(path, ids: list[int], length: int) -> None:
    path.write_bytes(np.array(ids, "<i4").tobytes())
    packed = Packed(path, length)
    sequences = [text.ids for text in packed]
    assert [i for sequence in sequences for i in sequence[1:]] == ids[1:]
    assert all(len(sequence) == length for sequence in sequences[:-1])
    assert 2 <= len(sequences[-1]) <= length
    assert all(a[-1] == b[0] for a, b in pairwise(sequences))
    assert all(all(text.in_completion) for text in packed)
    assert len(packed) == len(sequences)
    assert [packed[i].ids for i in range(-len(packed), 0)] == sequences


def test_texts_are_tokenized_alone_with_begin_and_end(tokenizer, path) -> None:
    texts = [f"buy {i} eggs\n\nand ünïcode" for i in range(TOGETHER + 3)]
    expected = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert write_tokens(tokenizer, iter(texts), path) == len(expected)
    assert np.fromfile(path, "<i4").tolist() == expected
    assert expected[0] == tokenizer.bos_token_id


def test_the_digest_is_that_of_the_tokens(path) -> None:
    path.write_bytes(np.arange(10, dtype="<i4").tobytes())
    assert Packed(path, 4).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_texts(tokenizer, path) -> None:
    assert write_tokens(tokenizer, [], path) == 0
    with pytest.raises(InvalidInput, match="no texts"):
        Packed(path, 4)
