"""Real models, small enough to run everything for real: LLaMA, Mistral and MobileLLM by transformers, adapters by peft, tokenizers by sentencepiece."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

TEXT = (
    "Once upon a time there was a little robot who lived in a small house by the sea.",
    "Set an alarm for 7:30 tomorrow, and remind me to buy milk, eggs and bread.",
    "The quick brown fox jumps over the lazy dog 1234567890 times; isn't that strange?",
    "def read(path):\n    return open(path).read()\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
)


def tiny_llama(
    path: Path,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_size: str | int = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a decoder of two layers with dense random weights; its logits spread like those of a trained model.

    Args:
        family: "llama", "mistral" or "mobilellm".
        dtype: of the weights.
        shard_size: in the form of `save_pretrained`, as "100KB"; a model above it is written in shards.
        config: what differs from the small default, as head_dim, num_key_value_heads, tie_word_embeddings,
            rope_parameters, num_hidden_layers, and of a MobileLLM layer_repeats.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM

    kinds: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "mobilellm": (MobileLLMConfig, MobileLLMForCausalLM),
    }
    make_config, make_model = kinds[family]
    defaults = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = make_model(make_config(**defaults | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            else:
                gain = 2.0 if "embed" in name or "lm_head" in name else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain * weight.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path


def tiny_adapter(model: Path, path: Path, *, seed: int = 1, gain: float = 0.5, **lora_config: Any) -> Path:
    """Save a LoRA for a model, with random A and B: it changes each targeted output by about `gain` of its size.

    Args:
        model: the folder of the base.
        lora_config: fields of peft's LoraConfig, as r, lora_alpha, target_modules, rank_pattern, use_rslora.
    """
    from peft import LoraConfig, get_peft_model

    from crayon_server import models

    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    base = models.load(model, torch.float32)
    tuned = get_peft_model(base, LoraConfig(**defaults | lora_config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                spread = gain if "lora_B" in name else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread * weight.shape[-1] ** -0.5)
    tuned.save_pretrained(path)
    return path


def tiny_tokenizer(path: Path, *, vocab_size: int = 320, **options: Any) -> Path:
    """Train a byte-fallback BPE tokenizer in LLaMA's manner and save it as PATH/tokenizer.model.

    Args:
        options: of sentencepiece's trainer, as user_defined_symbols or add_dummy_prefix.
    """
    import sentencepiece

    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 1.0,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=2,
        **defaults | options,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path
