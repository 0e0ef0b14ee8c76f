"""Tiny tokenizers, and an engine over the fake backend: for everything above the backends."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.engine import Engine
from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.tokenizer import Tokenizer
from tests.runtime import bundles

BOS, EOS = 1, 2
BYTE = 3
"""The id of byte 0; the others follow."""

WORDS = ["▁the", "▁alarm", "▁a", "▁b", "▁ab", "▁abc", "▁stop", "▁é", "▁日", "▁日本", "▁!", "▁?", "▁</s"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_fallback_library() -> tokenizers.Tokenizer:
    """As LLaMA 2: pieces with ▁ for a space, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            left, right = word[:end], word[end]
            merges.append((left, right))
            pieces += [left, right, left + right]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_control_tokens(library)


def byte_level_library() -> tokenizers.Tokenizer:
    """As GPT-2 and LLaMA 3: bytes shown as printable characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<unk>", "<s>", "</s>", *alphabet, "Ġt", "Ġth", "Ġthe", "ð", "ðŁ", "ðŁĺ"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return _with_control_tokens(library)


def tokenizer(
    library: tokenizers.Tokenizer | None = None,
    *,
    add_bos: bool = True,
    eos: list[int] | None = None,
    chat_template: str | None = None,
    document: dict[str, Any] | None = None,
) -> Tokenizer:
    """The runtime's tokenizer, from a tokenizer.json made of `library`, changed by `document`."""
    library = library or byte_fallback_library()
    size = library.get_vocab_size()
    info = Info(
        "tokenizer.json", vocab_size=size, add_bos=add_bos, bos=BOS, eos=eos or [EOS], chat_template=chat_template
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(json.loads(library.to_str()) | (document or {})))
        return Tokenizer(info, path)


def engine(script: Any = None, *, chat_template: str | None = None, bundle: Any = None, **options: Any) -> Engine:
    """An engine over the fake backend."""
    made = TOKENIZER if chat_template is None else tokenizer(chat_template=chat_template)
    return Engine(FakeBackend(script, **{"vocab_size": VOCAB_SIZE, "context_length": 1024} | options), made, bundle)


def bundle(folder: Path, *, chat_template: str | None = None) -> Bundle:
    """A model bundle whose tokenizer is real, with the adapters alice and bob inside. Only the fake backend runs it."""
    info = msgspec.structs.replace(TOKENIZER.info, chat_template=chat_template)
    with BundleWriter(folder / "model") as writer:
        for path, content in (bundles.FILES | {"tokenizer.json": byte_fallback_library().to_str().encode()}).items():
            writer.add_bytes(path, content)
        for name in ("alice", "bob"):
            writer.add_bundle(f"adapters/{name}", Bundle.open(bundles.write_adapter(folder / name, name)))
        writer.finish(msgspec.structs.replace(bundles.MODEL, tokenizer=info))
    return Bundle.open(folder / "model")


def fake(engine: Engine) -> FakeBackend:
    """The backend of such an engine."""
    assert isinstance(engine.backend, FakeBackend)
    return engine.backend


def byte_ids(text: str) -> list[int]:
    """A text as byte tokens, one per byte."""
    return [BYTE + byte for byte in text.encode()]


def _with_control_tokens(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return library


TOKENIZER = tokenizer()
VOCAB_SIZE = TOKENIZER.info.vocab_size
