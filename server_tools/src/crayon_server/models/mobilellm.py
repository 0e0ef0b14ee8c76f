"""MobileLLM and MobileLLM-LS in transformers: LLaMA's classes, and blocks whose weights are computed several times in a row.

Importing this module registers them, so that `AutoConfig` and `AutoModelForCausalLM` know the model type "mobilellm". The architecture is
that of "MobileLLM: Optimizing Sub-billion Parameter Language Models for On-Device Use Cases" (arXiv:2402.14905); what released
checkpoints say and do is taken from `configuration_mobilellm.py` of facebook/MobileLLM-125M and from `utils/modeling_llama.py` of
github.com/facebookresearch/MobileLLM (commit 1e67bf6).
"""

# No postponed annotations here: `strict` checks a configuration by the types of its fields.
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from crayon_export import jsonfile
from crayon_runtime.errors import CheckpointError, InvalidInput, UnsupportedModel
from crayon_runtime.files import atomic_directory
from crayon_server import models

RELEASED_REPEATS = 2
"""What `layer_sharing` of a released checkpoint means."""


@strict
class MobileLLMConfig(LlamaConfig):  # type: ignore[misc]
    """A LLaMA configuration with layer sharing; the defaults are MobileLLM-125M's.

    The fields of released checkpoints are understood: `share_embedding` ties the embeddings (their `tie_word_embeddings` is false
    even then), `layer_sharing` computes every block twice.

    Attributes:
        layer_repeats: how often in a row each of the `num_hidden_layers` blocks is computed; 1: once, as in LLaMA.
        kv_sharing: "correct": each pass of a block has its own slot of the KV cache. "released": all passes of a block write to one
            slot, and attend to what is there, as in the released code. See `SharedDecoderLayer`.
    """

    model_type = "mobilellm"

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int | None = 3
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    layer_repeats: int = 1
    kv_sharing: Literal["correct", "released"] = "correct"

    def __post_init__(self, share_embedding: bool = False, layer_sharing: bool = False, **kwargs: Any) -> None:
        self.tie_word_embeddings = self.tie_word_embeddings or share_embedding
        if layer_sharing and self.layer_repeats == 1:
            self.layer_repeats = RELEASED_REPEATS
        kwargs.pop("auto_map", None)  # of the released code, which does not come along
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the validation by `strict`."""
        super().validate_architecture()
        if self.layer_repeats < 1:
            raise ValueError(f"layer_repeats is {self.layer_repeats}; each block is computed at least once")

    @property
    def per_layer_config(self) -> list[LlamaConfig]:
        """One for each slot of the KV cache: transformers' caches are made from it."""
        return [self] * (self.num_hidden_layers * self.layer_repeats)

    def to_released(self) -> dict[str, Any]:
        """The config.json of a released checkpoint, which the released code reads.

        Raises:
            UnsupportedModel: blocks are computed more than twice.
        """
        if self.layer_repeats > RELEASED_REPEATS:
            raise UnsupportedModel(f"the released code computes a block once or twice, not {self.layer_repeats} times")
        ours = self._without_sharing()
        rope = ours.pop("rope_parameters")
        if rope["rope_type"] != "default":
            raise UnsupportedModel(f"the released code has no rotary embedding of type {rope['rope_type']!r}")
        return ours | {
            "architectures": ["MobileLLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
                "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
            },
            "tie_word_embeddings": False,
            "share_embedding": self.tie_word_embeddings,
            "layer_sharing": self.layer_repeats == RELEASED_REPEATS,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
        }

    def to_llama(self) -> dict[str, Any]:
        """The config.json of the same model as a LLaMA.

        Raises:
            UnsupportedModel: blocks are computed more than once, which LLaMA has no word for.
        """
        if self.layer_repeats > 1:
            raise UnsupportedModel(f"LLaMA computes each block once, this model {self.layer_repeats} times")
        return self._without_sharing() | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

    def _without_sharing(self) -> dict[str, Any]:
        ours: dict[str, Any] = self.to_diff_dict()
        return {field: value for field, value in ours.items() if field not in ("layer_repeats", "kv_sharing")}


class SharedDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A LLaMA block that is computed `layer_repeats` times in a row.

    The released code gives the cache one slot for all passes of a block, so with a cache a pass attends to the keys and values of
    the others as well: during a prompt, where the causal mask is aligned to the first keys in the slot, each pass to those of the first
    pass alone; afterwards to everything that is in the slot. Without a cache it computes what "correct" does. It fails where a mask is
    needed: with padding, with a prompt in pieces, or with attention other than torch's `scaled_dot_product_attention`.
    """

    def __init__(self, config: MobileLLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.slots = range(layer_idx * config.layer_repeats, (layer_idx + 1) * config.layer_repeats)
        self.kv_sharing = config.kv_sharing

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As LlamaDecoderLayer's; hidden_states are float [batch, T, hidden]."""
        released = self.kv_sharing == "released" and past_key_values is not None
        if released and attention_mask is not None:
            raise InvalidInput(
                "the KV cache of released checkpoints allows neither padding, nor a prompt in pieces, nor eager attention",
                do='set kv_sharing = "correct" in the configuration, or use_cache=False',
            )
        for slot in self.slots:
            cache = None if past_key_values is None else _Slot(past_key_values, slot, self.slots if released else None)
            hidden_states = super().forward(
                hidden_states, attention_mask=attention_mask, past_key_values=cache, **kwargs
            )
        return hidden_states


class _Slot:
    """The cache, as one pass of a block sees it.

    Args:
        slot: where the keys and values of this pass are.
        seen: the slots that the pass attends to; None: its own.
    """

    def __init__(self, cache: Cache, slot: int, seen: range | None) -> None:
        self._cache, self._slot, self._seen = cache, slot, seen

    def update(self, keys: torch.Tensor, values: torch.Tensor, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, each [batch, KV heads, T, head size], and return those that are attended to."""
        own: tuple[torch.Tensor, torch.Tensor] = self._cache.update(keys, values, self._slot)
        if self._seen is None:
            return own
        layers = [self._cache.layers[slot] for slot in self._seen]
        filled = [layer for layer in layers if layer.get_seq_length()]
        return torch.cat([layer.keys for layer in filled], 2), torch.cat([layer.values for layer in filled], 2)


class MobileLLMModel(LlamaModel):  # type: ignore[misc]
    """The decoder without its head. `hidden_states` are counted in blocks: 0 is the embedding, i what block i - 1 leaves after all of
    its passes, the last one is after the norm."""

    config_class = MobileLLMConfig

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__(config)
        _share_layers(self)
        self._no_split_modules = [_block(config)]


class MobileLLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The language model. Its tensors are named as LLaMA's, each block's once."""

    config_class = MobileLLMConfig

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__(config)
        _share_layers(self.model)
        self._no_split_modules = [_block(config)]


def _block(config: MobileLLMConfig) -> str:
    """The class of the blocks: what FSDP shards as a whole."""
    return "SharedDecoderLayer" if config.layer_repeats > 1 else "LlamaDecoderLayer"


def _share_layers(model: LlamaModel) -> None:
    """Put blocks that are computed several times in the place of LLaMA's, where the configuration wants them."""
    if model.config.layer_repeats > 1:
        for index in range(len(model.layers)):
            model.layers[index] = SharedDecoderLayer(model.config, index)
        model.post_init()


def convert(source: Path, out: Path, layout: str, *, replace: bool = False) -> None:
    """Write a MobileLLM folder in another layout: safetensors with LLaMA's names in each, a shared head left out, and its config.json.

    Args:
        source: ours, or a released checkpoint; its tokenizer comes along.
        layout: "mobilellm": ours. "released": for the released code. "llama": for everything that knows LLaMA.

    Raises:
        InvalidInput: there is no such layout.
        UnsupportedModel: the layout has no word for what the model does.
        CheckpointError: there is no model folder, or weights are missing or of other shapes.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    configs = {
        "mobilellm": MobileLLMConfig.to_diff_dict,
        "released": MobileLLMConfig.to_released,
        "llama": MobileLLMConfig.to_llama,
    }
    if layout not in configs:
        raise InvalidInput(f"there is no layout {layout!r}", do=f"choose one of {', '.join(configs)}")
    jsonfile.read(source / "config.json")  # transformers takes a folder that is not there for a name on the Hub
    try:
        model, loaded = MobileLLMForCausalLM.from_pretrained(
            source, dtype="auto", output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"it cannot be loaded: {e}", where=source) from e
    if loaded["missing_keys"] or loaded["unexpected_keys"]:
        names = sorted({*loaded["missing_keys"], *loaded["unexpected_keys"]})
        raise CheckpointError(
            f"its tensors are not a MobileLLM's: {names[0]} and {len(names) - 1} others", where=source
        )
    document = configs[layout](model.config)
    with atomic_directory(out, replace=replace) as folder:
        models.save_weights(model, folder)
        (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        for name in models.TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)


AutoConfig.register("mobilellm", MobileLLMConfig, exist_ok=True)
AutoModel.register(MobileLLMConfig, MobileLLMModel, exist_ok=True)
AutoModelForCausalLM.register(MobileLLMConfig, MobileLLMForCausalLM, exist_ok=True)
