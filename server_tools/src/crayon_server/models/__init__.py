"""The embedded models: small LLaMA-style decoders in MobileLLM's manner (SwiGLU, grouped queries, shared embedding).

`nano` is the device model: 0.5 M parameters that know every domain and convention of the phone-assistant benchmark, and cannot know
which convention is the user's. `nano-server` is the larger one that a server runs beside it, 1.9 M parameters: it knows further domains,
and the user as little. The weights of both are shipped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crayon_runtime.errors import InvalidInput
from crayon_runtime.files import atomic_directory

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT_LENGTH = 512

_SHAPES: dict[str, dict[str, int]] = {
    "nano": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
    },
    "nano-server": {
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 448,
    },
}
ARCHITECTURES = tuple(_SHAPES)


def config(name: str) -> LlamaConfig:
    """The transformers configuration of an architecture.

    Raises:
        InvalidInput: there is no architecture of this name.
    """
    from transformers import LlamaConfig

    from crayon_server.models import tokenizer

    if name not in _SHAPES:
        raise InvalidInput(f"there is no architecture {name!r}", do=f"choose one of {', '.join(ARCHITECTURES)}")
    fixed: dict[str, Any] = {
        "vocab_size": tokenizer.VOCAB_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.PAD_ID,
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.EOS_ID,
    }
    return LlamaConfig(**_SHAPES[name], **fixed)


def load_nano() -> Path:
    """The shipped Hugging Face folder of the trained `nano` (float32 safetensors, tokenizer.json, configurations)."""
    return Path(__file__).parent / "nano"


def load_nano_server() -> Path:
    """The same of `nano-server`, in float16."""
    return Path(__file__).parent / "nano_server"


def initialize(name: str, seed: int = 0) -> LlamaForCausalLM:
    """A model of an architecture with random weights (float32)."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(config(name))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a model with its tokenizer as a Hugging Face folder."""
    from crayon_server.models import tokenizer

    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    tokenizer.write(tokenizer.learn(), folder)


def create(name: str, out: Path, *, pretrained: bool = False, seed: int = 0, replace: bool = False) -> None:
    """Write a Hugging Face folder of an architecture, with random weights or with those that are shipped.

    Raises:
        InvalidInput: there is no architecture of this name.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    shipped = {"nano": load_nano(), "nano-server": load_nano_server()}
    with atomic_directory(out, replace=replace) as folder:
        if pretrained and name in shipped:
            shutil.copytree(shipped[name], folder, dirs_exist_ok=True)
        else:
            save(initialize(name, seed), folder)
