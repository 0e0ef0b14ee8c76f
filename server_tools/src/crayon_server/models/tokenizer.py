r"""The tokenizer of the embedded models: a byte-fallback BPE over the words of the phone-assistant benchmark.

Prompt format, which the chat template renders too (so `crayon chat` and plain prompts give the same ids):

    <s>{prompt}\n{completion}</s>

Merges never cross between letters, digits, a newline and the rest, so ids(prompt + "\n") + ids(completion) are the ids of the
whole text, and no pre-tokenizer is needed when encoding. Characters outside the vocabulary become byte tokens. Decoding gives any text
back, but for the character that stands for a space in the vocabulary (U+2581), which becomes one.
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import tokenizers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 640
SPACE = "\u2581"
"""How sentencepiece writes a space. Libraries that know LLaMA's tokenizer, such as onnxruntime-genai, expect it."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ bos_token }}{{ message['content'] | trim + '\n' }}{% endif %}"
    "{% endfor %}"
)
"""One exchange after the other. Every one starts with <s>: that is how the models are trained on several."""

_PIECES = r"\n|[\p{L}_]+|\p{N}{1,2}|[^\p{L}_\p{N}\n]+"


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> tokenizers.Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens: 3 special ones, 256 bytes, the characters of `texts`, merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    reserved = [PAD, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=reserved, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = {_spaced(token): i for token, i in learned["vocab"].items()}
    merges = [(_spaced(left), _spaced(right)) for left, right in learned["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    return tokenizer


def _spaced(token: str) -> str:
    return token.replace(" ", SPACE)


@functools.cache
def learn() -> tokenizers.Tokenizer:
    """The tokenizer of nano and nano-server, learnt anew (in a second) from texts of the benchmark's world."""
    from crayon_server.data.phone_assistant import DOMAINS, SERVER_ONLY, stream

    examples = stream("tokenizer", domains=(*DOMAINS, *SERVER_ONLY))
    return train(e.text for e in itertools.islice(examples, 20_000))


def write(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
