"""Meta's own layout of LLaMA: params.json and consolidated.00.pth, read as if transformers had saved it.

Meta stores the two numbers of a rotary pair side by side, transformers half a head apart; names differ as well. What the two
layouts hold is otherwise the same, and so is the fingerprint.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from crayon_export import jsonfile
from crayon_export.tensorfile import Tensor
from crayon_export.torchfile import read_torch
from crayon_runtime.errors import CheckpointError, UnsupportedModel

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_CONVERT = "convert it to the layout of transformers first (transformers' convert_llama_weights_to_hf)"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config in transformers' terms, and the tensors under transformers' names.

    params.json does not say how long the training context was; 2048, LLaMA's first, is assumed.

    Raises:
        CheckpointError: a file is missing or damaged, or the two contradict each other.
        UnsupportedModel: the weights are spread over several files, or use LLaMA-3.1's rope scaling.
    """
    params = jsonfile.read(path / "params.json")
    parts = sorted(path.glob("consolidated.*.pth"))
    if [part.name for part in parts] != ["consolidated.00.pth"]:
        what = f"{len(parts)} consolidated.*.pth files; one can be read" if parts else "there is no consolidated.00.pth"
        raise UnsupportedModel(what, where=path, do=_CONVERT) if parts else CheckpointError(what, where=path)
    if params.get("use_scaled_rope"):
        raise UnsupportedModel(
            "use_scaled_rope is not supported in Meta's layout", where=path / "params.json", do=_CONVERT
        )
    stored = read_torch(parts[0])
    config = _config(params, stored, path)
    head = config["hidden_size"] // config["num_attention_heads"]
    return config, {name: t for key, tensor in stored.items() for name, t in _rename(key, tensor, head)}


def _config(params: dict[str, Any], stored: dict[str, Tensor], path: Path) -> dict[str, Any]:
    try:
        hidden, heads = params["dim"], params["n_heads"]
        config = {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "num_hidden_layers": params["n_layers"],
            "rms_norm_eps": params["norm_eps"],
            "intermediate_size": stored["layers.0.feed_forward.w1.weight"].shape[0],
            "vocab_size": stored["tok_embeddings.weight"].shape[0],
            "max_position_embeddings": 2048,
            "rope_theta": params.get("rope_theta", 10000.0),
        }
    except (KeyError, IndexError) as e:
        raise CheckpointError(f"params.json and consolidated.00.pth have no {e.args[0]}", where=path) from None
    if not all(isinstance(n, int) and n > 0 for n in (hidden, heads)) or hidden % heads:
        raise CheckpointError(
            f"dim {hidden!r:.40} is not a multiple of n_heads {heads!r:.40}", where=path / "params.json"
        )
    return config


def _rename(key: str, tensor: Tensor, head: int) -> list[tuple[str, Tensor]]:
    """The tensor under its other name; nothing for the rotary frequencies, and the name itself where it has no other."""
    if key == "rope.freqs":
        return []
    layer, module = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*?)(?:\.weight)?", key, re.DOTALL).groups()  # type: ignore[union-attr]
    if module not in _NAMES:
        return [(key, tensor)]
    prefix = f"model.layers.{layer}." if layer else ""
    name = f"{prefix}{_NAMES[module]}.weight"
    interleaved = head if module in ("attention.wq", "attention.wk") else 0
    return [(name, replace(tensor, name=name, interleaved_head=interleaved))]
