"""From a sentencepiece BPE model to the JSON of the `tokenizers` library, with the same ids for every text.

transformers' own conversions differ from sentencepiece in leading spaces, in runs of spaces and in text that looks like a
control token, so this one starts from sentencepiece's protobuf, and each result is compared with sentencepiece before use.

One text is known to differ: one that is nothing but a single user-defined symbol loses the space that sentencepiece puts
before it, where `add_dummy_prefix` is set.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crayon_runtime.errors import CheckpointError, MissingExtra, UnsupportedModel

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_KINDS = {1: "unigram", 3: "word", 4: "char"}

_PROBES = (
    "",
    " ",
    "  two  spaces, three   and a trailing one ",
    "\n\ttabs\t\tand\r\nlines\n\n",
    "naïve café, cafe\u0301, Ελληνικά, русский, עברית, हिन्दी, ไทย",
    "漢字とかな 한국어 𠮷",
    "👩‍👩‍👧 🇩🇪 🏳️‍🌈",
    "<s></s><unk><0x0A>[INST] </s> <pad>",
    "\u2581already\u2581\u2581there\u2581",
    "\x00\x7f\ufeff\ufffd\U0010ffff",
    "def f(x):\n    return {'a': x[0] ** 2}  # 3.14e-10\n",
    "aaaaaaaaaaaaaaa" + " " * 37 + "=" * 40,
)


class SpecialIds(NamedTuple):
    """Control tokens by their role; None where the model has none."""

    bos: int | None
    eos: int | None
    pad: int | None


class Converted(NamedTuple):
    document: dict[str, Any]
    """A tokenizer.json, without a post-processor."""
    special: SpecialIds


def convert(path: Path) -> Converted:
    """Convert a `tokenizer.model`.

    Raises:
        CheckpointError: the file is no sentencepiece model.
        UnsupportedModel: it is not BPE, normalizes characters, or has pieces that cannot be expressed; named in the message.
        MissingExtra: sentencepiece or protobuf is not installed.
    """
    model, processor = _read(path)
    _check_supported(model, path)
    vocabulary = {piece.piece: id_ for id_, piece in enumerate(model.pieces)}
    normalizer, decoder = _normalizer(model), _decoder(model)
    unknown = next((p.piece for p in model.pieces if p.type == _UNKNOWN), None)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(model)),
        "normalizer": _sequence(normalizer, "normalizers"),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _sequence(decoder, "decoders"),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(model),
        },
    }
    _compare(document, model, processor, path)
    special = SpecialIds(*(i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.pad_id())))
    return Converted(document, special)


def _read(path: Path) -> tuple[Any, Any]:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError:
        raise MissingExtra("export", f"converting {path.name}") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    document = path.read_bytes()
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(document)  # type: ignore[attr-defined]
        return model, sentencepiece.SentencePieceProcessor(model_proto=document)
    except (DecodeError, RuntimeError) as e:
        raise CheckpointError(
            f"not a sentencepiece model: {e}",
            where=path,
            do="download it again; a few hundred bytes are a Git LFS pointer",
        ) from None


def _check_supported(model: Any, path: Path) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE:
        kind = _KINDS.get(trainer.model_type, f"number {trainer.model_type}")
        raise UnsupportedModel(f"a sentencepiece model of type {kind} is not supported; bpe is", where=path)
    unsupported = {
        f"the character normalization {normalizer.name!r}": normalizer.precompiled_charsmap,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "spaces at the end of words": trainer.treat_whitespace_as_suffix,
        "unused pieces": any(piece.type == _UNUSED for piece in model.pieces),
    }
    for what, found in unsupported.items():
        if found:
            raise UnsupportedModel(
                f"a sentencepiece model with {what} is not supported",
                where=path,
                do="put a tokenizer.json beside the model, which is used instead",
            )


def _merges(model: Any) -> list[list[str]]:
    """Pairs in the order in which sentencepiece would merge them: by the score of what they make."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    pairs = [
        (-score, [piece[:i], piece[i:]])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return [pair for _, pair in sorted(pairs, key=lambda entry: entry[0])]


def _added_tokens(model: Any) -> Iterator[dict[str, Any]]:
    """Control tokens, never found in plain text; and user-defined symbols, always found, after normalization."""
    for id_, piece in enumerate(model.pieces):
        if piece.type in (_CONTROL, _USER_DEFINED):
            yield added_token(id_, piece.piece, special=piece.type == _CONTROL, normalized=piece.type != _CONTROL)


def added_token(id_: int, content: str, *, special: bool, normalized: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`: whether it is a control token, and sought in text after normalization."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": id_, "content": content, **flags}


def _normalizer(model: Any) -> list[dict[str, Any]]:
    spec = model.normalizer_spec
    trim = spec.remove_extra_whitespaces
    steps = [_replace(r"\A +", ""), _replace(r" {2,}", " ")] if trim else []
    symbols = "|".join(re.escape(p.piece) for p in model.pieces if p.type == _USER_DEFINED)
    if spec.add_dummy_prefix and symbols:
        # The library normalizes an added token as it does a text; a prefix would keep it from being found inside a text.
        steps.append(_replace(rf"\A(?!(?:{symbols})\z)(?=[\s\S])", _SPACE))
    elif spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return [*steps, _replace(rf"{_SPACE}+\z", "")] if trim else steps


def _decoder(model: Any) -> list[dict[str, Any]]:
    """The prefix goes before escaped spaces are restored, so that a space that came as a byte stays."""
    spec = model.normalizer_spec
    unknown = [
        _replace(rf"\A{re.escape(piece.piece)}\z", model.trainer_spec.unk_surface)
        for piece in model.pieces
        if piece.type == _UNKNOWN
    ]
    more = rf"(?:{_SPACE}+(?=[^{_SPACE}]))?" if spec.remove_extra_whitespaces else ""
    # Strips nothing: onnxruntime-genai, which ignores the normalizer, takes it as the sign of a prefix.
    sign = {"type": "Strip", "content": " ", "start": 0, "stop": 0}
    return [
        *unknown,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *[_replace(rf"\A{_SPACE}{more}", "")] * (spec.add_dummy_prefix or spec.remove_extra_whitespaces),
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        *[sign] * spec.add_dummy_prefix,
    ]


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _sequence(steps: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def _compare(document: dict[str, Any], model: Any, processor: Any, path: Path) -> None:
    """Refuse a conversion that gives other ids or another text than sentencepiece, on probes and on every piece."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = True
    pieces = [p.piece.replace(_SPACE, " ") for p in model.pieces if p.type in (_NORMAL, _USER_DEFINED)]
    groups = ("".join(pieces[i : i + 100]) for i in range(0, len(pieces), 100))
    for text in itertools.chain(_PROBES, groups):
        expected, ids = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if ids != expected or tokenizer.decode(ids, skip_special_tokens=True) != processor.decode(expected):
            raise UnsupportedModel(
                f"this sentencepiece model cannot be converted exactly: {text!r:.80} would be split in another way",
                where=path,
                do="put a tokenizer.json beside the model, which is used instead",
            )
