"""genai_config.json: what onnxruntime-genai needs to run the same bundle."""

from __future__ import annotations

import json
from typing import Any

from crayon_runtime.manifest import Architecture, Tokenizer


def genai_config(a: Architecture, tokenizer: Tokenizer, *, model_file: str, context_length: int) -> bytes:
    """The file's bytes, for `onnxruntime_genai.Model(BUNDLE)`; adapters load through its `Adapters`."""
    model: dict[str, Any] = {
        "type": "llama",
        "vocab_size": a.vocab_size,
        "context_length": context_length,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad if tokenizer.pad is not None else next(iter(tokenizer.eos), 0),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
            "filename": model_file,
            "head_size": a.head_size,
            "hidden_size": a.hidden_size,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.kv_heads,
            "num_hidden_layers": a.passes,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if tokenizer.bos is not None:
        model["bos_token_id"] = tokenizer.bos
    search = {"max_length": context_length, "do_sample": False, "past_present_share_buffer": True}
    return json.dumps({"model": model, "search": search}, indent=1).encode() + b"\n"
