"""Judge: sentencepiece itself, on random texts that are made to be hard."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from crayon_export import sentencepiece_bpe
from crayon_export.sentencepiece_bpe import convert
from crayon_runtime.errors import CheckpointError, UnsupportedModel
from tests.export.models import tiny_tokenizer
from tests.support import needs

NASTY = (
    "",
    " ",
    "  leading, double  and trailing  ",
    "\n\n\ttabs\tand\r\nnewlines\n",
    "👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 ⁇",
    "e\u0301 vs é, Å vs A\u030a, ﬁ",
    "<s>Hi</s><unk><pad><0x0A><0xFF>[INST]",
    "\u2581\u2581escaped\u2581",
    "漢字かな交じり文、한국어, ไทย, हिन्दी",
    "\x00\x01\x7f\u00a0\u200b\ufeff\ufffd\U0010ffff",
)


def judge(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, tokenizers.Tokenizer]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(convert(path).document))
    tokenizer.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), tokenizer


def random_texts(pieces: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    alphabets: list[list[str]] = [
        [piece.replace("\u2581", " ") for piece in pieces],
        ["a", "b", " ", "  ", "\u2581", "\n", "<foo>", "[X]", "<s>", "<0x41>", "é", "漢", "🎉"],
        [" ", "the", ".", "\n", "  "],
        list("etaoin shrdlu"),
        [chr(c) for c in (*range(32, 0x250), *range(0x4E00, 0x4E80), *range(0x1F300, 0x1F380))],
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 60))) for _ in range(count)]


def check_equal(path: Path, *, count: int = 1500, symbols: tuple[str, ...] = ()) -> None:
    """Ids and text of every random text, but for the one difference that the module documents."""
    processor, tokenizer = judge(path)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    for text in [*NASTY, *random_texts(pieces, count)]:
        if text in symbols:
            continue
        expected = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, repr(text)
        assert tokenizer.decode(expected) == processor.decode(expected), repr(text)


def test_the_tokenizer_of_a_real_model() -> None:
    check_equal(needs.reference_model() / "tokenizer.model", count=4000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 120},
        {"byte_fallback": False, "vocab_size": 120, "remove_extra_whitespaces": True, "unk_surface": "<?>"},
        {"split_by_whitespace": False, "split_digits": False, "max_sentencepiece_length": 64, "vocab_size": 600},
        {"control_symbols": ["<|im_start|>"], "pad_id": 3, "vocab_size": 330},
    ],
)
def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    check_equal(tiny_tokenizer(tmp_path, **options) / "tokenizer.model")


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("symbols", [("<foo>",), ("<foo>", "[X]", "<foo>bar"), ("\u2581<PRE>", "<foo>")])
def test_user_defined_symbols(tmp_path: Path, symbols: tuple[str, ...], add_dummy_prefix: bool) -> None:
    path = tiny_tokenizer(tmp_path, user_defined_symbols=list(symbols), add_dummy_prefix=add_dummy_prefix)
    check_equal(path / "tokenizer.model", symbols=symbols)


def test_the_documented_difference(tmp_path: Path) -> None:
    processor, tokenizer = judge(tiny_tokenizer(tmp_path, user_defined_symbols=["<foo>"]) / "tokenizer.model")
    symbol = processor.piece_to_id("<foo>")
    assert processor.encode("<foo>") == [processor.piece_to_id("\u2581"), symbol]
    assert tokenizer.encode("<foo>", add_special_tokens=False).ids == [symbol]


def test_any_ids_but_broken_characters_decode_as_sentencepiece_does(tmp_path: Path) -> None:
    processor, tokenizer = judge(tiny_tokenizer(tmp_path) / "tokenizer.model")
    whole = [i for i in range(processor.get_piece_size()) if not processor.is_byte(i)]
    rng = random.Random(1)
    for _ in range(1000):
        ids = rng.choices(whole, k=rng.randrange(1, 12))
        assert tokenizer.decode(ids) == processor.decode(ids), ids


def test_control_tokens_are_found_only_when_asked_for(tmp_path: Path) -> None:
    processor, tokenizer = judge(tiny_tokenizer(tmp_path) / "tokenizer.model")
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == processor.encode("</s>") != [2]
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]


@pytest.mark.parametrize(
    "options, special",
    [({}, (1, 2, None)), ({"pad_id": 3}, (1, 2, 3)), ({"bos_id": -1, "eos_id": 1}, (None, 1, None))],
)
def test_control_tokens_by_role(tmp_path: Path, options: dict[str, Any], special: tuple[int | None, ...]) -> None:
    assert convert(tiny_tokenizer(tmp_path, **options) / "tokenizer.model").special == special


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram"}, "of type unigram is not supported; bpe is"),
        ({"model_type": "char", "byte_fallback": False}, "of type char is not supported"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the character normalization 'nmt_nfkc'"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the end of words"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        convert(tiny_tokenizer(tmp_path, **options) / "tokenizer.model")


def test_unused_pieces_are_refused(tmp_path: Path) -> None:
    path = tiny_tokenizer(tmp_path) / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.pieces[-1].type = 5
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModel, match="unused pieces"):
        convert(path)


def test_a_conversion_that_would_not_be_exact_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_tokenizer(tmp_path) / "tokenizer.model"
    merges = sentencepiece_bpe._merges
    monkeypatch.setattr(sentencepiece_bpe, "_merges", lambda model: merges(model)[::-1])
    with pytest.raises(UnsupportedModel, match="cannot be converted exactly"):
        convert(path)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\x03\x0a\x01a"]
)
def test_what_is_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedModel)):
        convert(tmp_path / "tokenizer.model")


def test_a_truncated_model(tmp_path: Path) -> None:
    path = tiny_tokenizer(tmp_path) / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((CheckpointError, UnsupportedModel)):
        convert(path)
