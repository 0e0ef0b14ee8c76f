"""The models that a device runs: MobileLLM's decoders (LLaMA's blocks, deep and thin, with grouped queries and a shared embedding).

`nano` is the demo's device model: 0.5 M parameters that know every domain and convention of the phone-assistant benchmark, and cannot know
which convention is the user's. `nano-server` is the larger one that a server runs beside it, 1.9 M parameters: it knows further domains,
and the user as little. The weights of both are shipped.

`mobilellm-125m` to `mobilellm-1.5b` have the shapes of arXiv:2402.14905, and `mobilellm-ls-125m` to `mobilellm-ls-1.5b` compute each block
twice. All are of the classes in `crayon_server.models.mobilellm`; `load` reads a folder of any of them.
"""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.files import atomic_directory

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What belongs to the tokenizer in a Hugging Face folder."""

CONTEXT_LENGTH = 512
"""Of the nano models."""


class _Shape(NamedTuple):
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int


_NANO = {
    "nano": _Shape(4, 96, 4, 2, 256, 32),
    "nano-server": _Shape(5, 192, 6, 2, 448, 32),
}
_MOBILELLM = {
    "125m": _Shape(30, 576, 9, 3, 1536, 64),
    "350m": _Shape(32, 960, 15, 5, 2560, 64),
    "600m": _Shape(40, 1152, 18, 6, 3072, 64),
    "1b": _Shape(54, 1280, 20, 5, 3584, 64),
    "1.5b": _Shape(54, 1600, 25, 5, 4352, 64),
}
_REPEATS = {"mobilellm": 1, "mobilellm-ls": 2}
_MOST_TOKENS = 1 << 24

NANO = tuple(_NANO)
ARCHITECTURES = (*NANO, *(f"{family}-{size}" for family in _REPEATS for size in _MOBILELLM))


def config(name: str, *, vocab_size: int | None = None, layer_repeats: int | None = None) -> MobileLLMConfig:
    """The transformers configuration of an architecture.

    Args:
        vocab_size: None: the benchmark's tokenizer's for the nano models, 32,000 for the others.
        layer_repeats: how often each block is computed; None: twice for mobilellm-ls, else once.

    Raises:
        InvalidInput: there is no architecture of this name, or the vocabulary is too small for its special tokens.
    """
    if name not in ARCHITECTURES:
        raise InvalidInput(f"there is no architecture {name!r}", do=f"choose one of {', '.join(ARCHITECTURES)}")
    if vocab_size is not None and vocab_size < 3:
        raise InvalidInput(f"a vocabulary of {vocab_size} tokens has no place for padding, begin and end")
    from crayon_server.models import tokenizer
    from crayon_server.models.mobilellm import MobileLLMConfig

    if name in _NANO:
        return MobileLLMConfig(
            **_fields(_NANO[name]),
            vocab_size=vocab_size or tokenizer.VOCAB_SIZE,
            max_position_embeddings=CONTEXT_LENGTH,
            initializer_range=0.05,
            layer_repeats=layer_repeats or 1,
            pad_token_id=tokenizer.PAD_ID,
            bos_token_id=tokenizer.BOS_ID,
            eos_token_id=tokenizer.EOS_ID,
        )
    family, _, size = name.rpartition("-")
    return MobileLLMConfig(
        **_fields(_MOBILELLM[size]),
        vocab_size=vocab_size or 32_000,
        pad_token_id=0,
        layer_repeats=layer_repeats or _REPEATS[family],
    )


def _fields(shape: _Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def register() -> None:
    """Let transformers know the model type "mobilellm", for code that loads a folder by `AutoModelForCausalLM` itself."""
    import crayon_server.models.mobilellm  # noqa: F401 - its import does that


def load(folder: str | PathLike[str], dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """The model of any Hugging Face folder, for inference; nothing is fetched from the Hub.

    Args:
        dtype: of the weights; "auto": as they are stored.

    Raises:
        OSError, ValueError: transformers', if there is no such folder, or nothing that can be loaded in it.
    """
    from transformers import AutoModelForCausalLM

    register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval()


def load_tokenizer(folder: str | PathLike[str], **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of any Hugging Face folder; options and errors are those of transformers' `AutoTokenizer`."""
    from transformers import AutoTokenizer

    register()  # it looks at config.json, too
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    return tokenizer


def load_nano() -> Path:
    """The shipped Hugging Face folder of the trained `nano` (float32 safetensors, tokenizer.json, configurations)."""
    return Path(__file__).parent / "nano"


def load_nano_server() -> Path:
    """The same of `nano-server`, in float16."""
    return Path(__file__).parent / "nano_server"


def initialize(
    name: str, seed: int = 0, *, vocab_size: int | None = None, layer_repeats: int | None = None
) -> MobileLLMForCausalLM:
    """A model of an architecture with random weights (float32)."""
    import torch

    from crayon_server.models.mobilellm import MobileLLMForCausalLM

    configuration = config(name, vocab_size=vocab_size, layer_repeats=layer_repeats)
    torch.manual_seed(seed)
    return MobileLLMForCausalLM(configuration)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a nano model with its tokenizer as a Hugging Face folder."""
    from crayon_server.models import tokenizer

    save_weights(model, folder)
    tokenizer.write(tokenizer.learn(), folder)


def save_weights(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a model without a tokenizer as a Hugging Face folder.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as e:  # it says in words what the system said
        raise OutputError(f"the model cannot be written: {e}", where=folder, do="free some space") from e
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes it for its owner alone


def create(
    name: str,
    out: Path,
    *,
    pretrained: bool = False,
    seed: int = 0,
    replace: bool = False,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    layer_repeats: int | None = None,
) -> None:
    """Write a Hugging Face folder of an architecture, with random weights or with those that are shipped.

    Args:
        tokenizer: a tokenizer.json, tokenizer.model or folder with one of them, to write beside the weights; None: the nano models get
            theirs, the others none.
        vocab_size: of random weights; None: that of `tokenizer`, or else as in `config`.
        layer_repeats: of random weights, as in `config`.

    Raises:
        InvalidInput: there is no architecture of this name, or there are no weights of it.
        CheckpointError: there is no tokenizer, or it has more tokens than `vocab_size`.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    shipped = {"nano": load_nano(), "nano-server": load_nano_server()}
    if pretrained and name in ARCHITECTURES and name not in shipped:
        raise InvalidInput(
            f"no weights of {name} are shipped", do=f"leave out --pretrained; there are those of {', '.join(shipped)}"
        )
    if pretrained and (tokenizer or vocab_size or layer_repeats):
        raise InvalidInput(
            "the shipped weights have a tokenizer of their own, and no shared layers", do="leave out --pretrained"
        )
    if vocab_size and name in NANO and not tokenizer:
        raise InvalidInput(f"the vocabulary of {name} is its tokenizer's", do="give another --tokenizer as well")
    with atomic_directory(out, replace=replace) as folder:
        if pretrained and name in shipped:
            shutil.copytree(shipped[name], folder, dirs_exist_ok=True)
        elif tokenizer:
            save_weights(_initialize_for(tokenizer, folder, name, seed, vocab_size, layer_repeats), folder)
        elif name in NANO:
            save(initialize(name, seed, layer_repeats=layer_repeats), folder)
        else:
            save_weights(initialize(name, seed, vocab_size=vocab_size, layer_repeats=layer_repeats), folder)


def _initialize_for(
    tokenizer: Path, folder: Path, name: str, seed: int, vocab_size: int | None, layer_repeats: int | None
) -> MobileLLMForCausalLM:
    """A model for a tokenizer, which is copied into a folder."""
    from crayon_export.tokenizer import convert

    info = convert(tokenizer, folder, model_vocab_size=vocab_size or _MOST_TOKENS)
    model = initialize(name, seed, vocab_size=vocab_size or info.vocab_size, layer_repeats=layer_repeats)
    eos = info.eos[0] if len(info.eos) == 1 else info.eos or None
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = info.bos, eos, info.pad
    return model
