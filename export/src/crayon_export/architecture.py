"""LLaMA-style architectures as data: what a config.json means, which tensors it implies, and its rotary tables.

The next architecture is a row in `_FAMILIES` and, where its blocks differ, in `_BLOCK`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import UnsetType

from crayon_runtime.errors import CheckpointError, UnsupportedModel
from crayon_runtime.manifest import MOST_REPEATS, Architecture, Rope

Where = str | PathLike[str]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class TensorSpec(NamedTuple):
    """A tensor that a model must have."""

    name: str
    shape: tuple[int, ...]


class Linear(NamedTuple):
    """A linear layer that an adapter may target; its weight is `MODULE.weight` [out_features, in_features]."""

    module: str
    """As model.layers.0.self_attn.q_proj."""
    name: str
    """As q_proj."""
    layer: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class _Family:
    """What transformers assumes when config.json leaves a field out."""

    architecture: str
    kv_heads: int | None
    context_length: int
    sliding_window: int | None
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    shares_layers: bool = False
    """Whether it may compute each block several times in a row; its configs have the fields of MobileLLM's."""


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", kv_heads=None, context_length=2048, sliding_window=None),
    "mistral": _Family("MistralForCausalLM", kv_heads=8, context_length=131072, sliding_window=4096),
    "mobilellm": _Family(
        "MobileLLMForCausalLM",
        kv_heads=3,
        context_length=2048,
        sliding_window=None,
        norm_eps=1e-5,
        tied_embeddings=True,
        shares_layers=True,
    ),
}

# Module, and the sizes of its weight in terms of `_sizes`, in the order of computation.
_BLOCK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", ("hidden",)),
    ("self_attn.q_proj", ("queries", "hidden")),
    ("self_attn.k_proj", ("keys", "hidden")),
    ("self_attn.v_proj", ("keys", "hidden")),
    ("self_attn.o_proj", ("hidden", "queries")),
    ("post_attention_layernorm", ("hidden",)),
    ("mlp.gate_proj", ("ffn", "hidden")),
    ("mlp.up_proj", ("ffn", "hidden")),
    ("mlp.down_proj", ("hidden", "ffn")),
)

# Larger than any published model by far; they keep a hostile config from asking for absurd amounts of work.
_LIMITS = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
    "original_max_position_embeddings": 1 << 30,
    "layer_repeats": MOST_REPEATS,
}

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
}


def read(config: Mapping[str, Any], *, where: Where = "config.json", context_length: int | None = None) -> Architecture:
    """The architecture that a transformers config.json describes.

    A sliding window is attention over everything as long as the context fits into it, so `trained_context_length` is the
    smaller of `max_position_embeddings` and the window.

    Args:
        config: the parsed config.json, as written by transformers 4 or 5.
        where: named in errors.
        context_length: the context that is wanted, to be checked against a sliding window.

    Raises:
        UnsupportedModel: something that it asks for is not supported; the message names it.
        CheckpointError: a field is missing, absurd, or contradicts another.
    """
    family = _family(config, where)
    hidden = _count(config, "hidden_size", where)
    heads = _count(config, "num_attention_heads", where)
    groups = heads if "num_key_value_heads" in config else family.kv_heads or heads
    kv_heads = _count(config, "num_key_value_heads", where, default=groups)
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads cannot share {kv_heads} key/value heads", where=where)
    return Architecture(
        model_type=config["model_type"],
        layers=_count(config, "num_hidden_layers", where),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=_head_size(config, hidden, heads, where),
        ffn_size=_count(config, "intermediate_size", where),
        vocab_size=_count(config, "vocab_size", where),
        tied_embeddings=_tied(config, family, where),
        norm_eps=_positive(config, "rms_norm_eps", where, default=family.norm_eps),
        rope=_rope(config, family, where),
        trained_context_length=_context(config, family, context_length, where),
        layer_repeats=_repeats(config, family, where),
    )


def tensors(architecture: Architecture) -> list[TensorSpec]:
    """Every tensor that the model reads, in the order of computation; a tied head is not listed again, nor a block that is repeated."""
    a = architecture
    sizes = _sizes(a)
    blocks = [
        TensorSpec(f"model.layers.{layer}.{module}.weight", tuple(sizes[s] for s in shape))
        for layer in range(a.layers)
        for module, shape in _BLOCK
    ]
    head = [] if a.tied_embeddings else [TensorSpec(HEAD, (a.vocab_size, a.hidden_size))]
    return [
        TensorSpec(EMBEDDING, (a.vocab_size, a.hidden_size)),
        *blocks,
        TensorSpec(FINAL_NORM, (a.hidden_size,)),
        *head,
    ]


def parameters(architecture: Architecture) -> int:
    """How many numbers the model consists of; a tied head is not counted again."""
    return sum(math.prod(shape) for _, shape in tensors(architecture))


def linears(architecture: Architecture) -> list[Linear]:
    """The linear layers of every block, in the order of computation; those of a block that is repeated once."""
    sizes = _sizes(architecture)
    return [
        Linear(
            module=f"model.layers.{layer}.{module}",
            name=module.rpartition(".")[2],
            layer=layer,
            in_features=sizes[shape[1]],
            out_features=sizes[shape[0]],
        )
        for layer in range(architecture.layers)
        for module, shape in _BLOCK
        if len(shape) == 2
    ]


def rotary_tables(
    architecture: Architecture, context_length: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines of the rotary embedding, each float32 [context_length, head_size / 2].

    Positions and frequencies are multiplied in float32, as transformers does: that rounding is part of what a model learned.
    """
    positions = np.arange(context_length, dtype=np.float32)
    angles = np.outer(positions, _frequencies(architecture)).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _frequencies(a: Architecture) -> npt.NDArray[np.float32]:
    """Radians per position, float32 [head_size / 2]; llama3's bands as in transformers' `_compute_llama3_parameters`."""
    exponents = np.arange(0, a.head_size, 2, dtype=np.float32) / np.float32(a.head_size)
    frequencies = np.float32(1) / (a.rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    if a.rope.type == "default":
        return frequencies
    factor = np.float32(_given(a.rope.factor))
    if a.rope.type == "linear":
        return frequencies / factor
    low, high = _given(a.rope.low_freq_factor), _given(a.rope.high_freq_factor)
    original = _given(a.rope.original_context_length)
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, smoothed)
    return np.where(wavelengths < original / high, frequencies, scaled)


def _sizes(a: Architecture) -> dict[str, int]:
    return {
        "hidden": a.hidden_size,
        "queries": a.heads * a.head_size,
        "keys": a.kv_heads * a.head_size,
        "ffn": a.ffn_size,
    }


def _family(config: Mapping[str, Any], where: Where) -> _Family:
    """The family of a config, after everything that no family supports has been refused."""
    if "model_type" not in config:
        raise CheckpointError("it has no model_type", where=where, do="give the folder of a transformers model")
    model_type = config["model_type"]
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    supported = ", ".join(_FAMILIES)
    if family is None:
        raise UnsupportedModel(
            f"the model type {model_type!r} is not supported", where=where, do=f"use {supported} models"
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UnsupportedModel(
            f"the architecture {architectures!r} is not supported; {family.architecture} is",
            where=where,
            do="save the language model with its head, not a classifier or a bare encoder",
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"the checkpoint is already quantized ({method})",
            where=where,
            do="use the original F32, F16 or BF16 checkpoint",
        )
    for field, accepted in _ONLY.items():
        if config.get(field) not in accepted:
            raise UnsupportedModel(f"{field} = {config[field]!r} is not supported", where=where)
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise UnsupportedModel(f"layers of types {layer_types!r:.80} are not supported", where=where)
    return family


def _tied(config: Mapping[str, Any], family: _Family, where: Where) -> bool:
    """Released MobileLLMs say `share_embedding`, whatever their `tie_word_embeddings` is."""
    tied = _flag(config, "tie_word_embeddings", where, default=family.tied_embeddings)
    shared = family.shares_layers and _flag(config, "share_embedding", where)
    return tied or shared


def _repeats(config: Mapping[str, Any], family: _Family, where: Where) -> int:
    """Released MobileLLMs say `layer_sharing`, which is two passes."""
    if not family.shares_layers:
        return 1
    repeats = _count(config, "layer_repeats", where, default=1)
    if repeats == 1 and _flag(config, "layer_sharing", where):
        repeats = 2
    if repeats > 1 and config.get("kv_sharing") == "released":
        raise UnsupportedModel(
            "one slot of the KV cache for all passes of a block (kv_sharing = 'released') is not supported",
            where=where,
            do="set kv_sharing to 'correct': the model was trained so, without a cache",
        )
    return repeats


def _head_size(config: Mapping[str, Any], hidden: int, heads: int, where: Where) -> int:
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of {heads} attention heads", where=where)
    size = _count(config, "head_dim", where, default=hidden // heads)
    if size % 2:
        raise CheckpointError(f"the head size {size} is odd; rotary embedding needs pairs", where=where)
    return size


def _context(config: Mapping[str, Any], family: _Family, wanted: int | None, where: Where) -> int:
    trained = _count(config, "max_position_embeddings", where, default=family.context_length)
    if family.sliding_window is None or config.get("sliding_window", family.sliding_window) is None:
        return trained
    window = _count(config, "sliding_window", where, default=family.sliding_window)
    if wanted is not None and wanted > window:
        raise UnsupportedModel(
            f"a context of {wanted} tokens needs sliding-window attention (the window is {window})",
            where=where,
            do=f"use a context length of at most {window}",
        )
    return min(trained, window)


def _rope(config: Mapping[str, Any], family: _Family, where: Where) -> Rope:
    """transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`, which wins where both are there."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"the rope parameters are {given!r}, not an object", where=where)
    if any(isinstance(v, dict) for v in given.values()):
        raise UnsupportedModel("rope parameters that differ between layers are not supported", where=where)
    if given.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
        raise UnsupportedModel(
            f"partial_rotary_factor = {given['partial_rotary_factor']!r} is not supported", where=where
        )
    rope = {"rope_theta": config.get("rope_theta"), **{k: v for k, v in given.items() if v is not None}}
    theta = _positive(rope, "rope_theta", where, default=10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, type="linear", factor=_positive(rope, "factor", where))
    if kind != "llama3":
        raise UnsupportedModel(
            f"the rope type {kind!r} is not supported", where=where, do="default, linear and llama3 are"
        )
    low, high = _positive(rope, "low_freq_factor", where), _positive(rope, "high_freq_factor", where)
    if low >= high:
        raise CheckpointError(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}", where=where)
    trained = _count(config, "max_position_embeddings", where, default=family.context_length)
    source = config if "original_max_position_embeddings" in config else rope
    return Rope(
        theta=theta,
        type="llama3",
        factor=_positive(rope, "factor", where),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_length=_count(source, "original_max_position_embeddings", where, default=trained),
    )


def _count(config: Mapping[str, Any], field: str, where: Where, *, default: int | None = None) -> int:
    """A whole number within its limit; `default` stands for an absent or null field."""
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"it has no {field}", where=where, do="give the config.json of the checkpoint itself")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[field]:
        raise CheckpointError(f"{field} is {value!r:.40}, not a whole number from 1 to {_LIMITS[field]}", where=where)
    return value


def _positive(config: Mapping[str, Any], field: str, where: Where, *, default: float | None = None) -> float:
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{field} is {value!r:.40}, not a positive number", where=where)
    return float(value)


def _flag(config: Mapping[str, Any], field: str, where: Where, *, default: bool = False) -> bool:
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{field} is {value!r:.40}, not true or false", where=where)
    return value


def _given(value: float | UnsetType) -> float:
    """A parameter that the rope's type requires."""
    if isinstance(value, UnsetType):
        raise CheckpointError("the rope scaling lacks one of its parameters")
    return value
