"""Judge: transformers' own configs and rotary embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from crayon_export import architecture
from crayon_runtime.errors import CheckpointError, UnsupportedModel
from crayon_runtime.manifest import Rope

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
MISTRAL: dict[str, Any] = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "head_dim": 24, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {**LLAMA, "rope_theta": 500000.0},
        {**LLAMA, "rope_scaling": None, "rope_theta": 1e6},
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {**LLAMA, "rope_scaling": LLAMA3, "rope_theta": 500000.0},
        {**LLAMA, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "max_position_embeddings")},
        {**LLAMA, "num_key_value_heads": None, "head_dim": None},
        {**MISTRAL, "sliding_window": None},
        {k: v for k, v in MISTRAL.items() if k != "num_key_value_heads"} | {"num_attention_heads": 16},
    ],
)
def test_a_config_means_what_it_means_to_transformers(config: dict[str, Any]) -> None:
    from transformers import LlamaConfig, MistralConfig

    judge = {"llama": LlamaConfig, "mistral": MistralConfig}[config["model_type"]].from_dict(
        {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    )

    a = architecture.read(config)

    assert (a.layers, a.hidden_size, a.ffn_size) == (3, 64, 96)
    assert (a.heads, a.kv_heads, a.head_size) == (judge.num_attention_heads, judge.num_key_value_heads, judge.head_dim)
    assert (a.vocab_size, a.tied_embeddings) == (judge.vocab_size, judge.tie_word_embeddings)
    assert a.norm_eps == judge.rms_norm_eps
    window = getattr(judge, "sliding_window", None) or judge.max_position_embeddings
    assert a.trained_context_length == min(judge.max_position_embeddings, window)
    rope = judge.rope_parameters
    assert (a.rope.type, a.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    if a.rope.type != "default":
        assert a.rope.factor == rope["factor"]
    if a.rope.type == "llama3":
        assert a.rope.original_context_length == rope["original_max_position_embeddings"]


@pytest.mark.parametrize("head_size", [8, 64, 96, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 512},
    ],
)
def test_rotary_tables_are_those_of_transformers(head_size: int, rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**LLAMA, "head_dim": head_size, "max_position_embeddings": 4096, "rope_parameters": rope}
    judge = LlamaRotaryEmbedding(LlamaConfig.from_dict({**config, "rope_parameters": dict(rope)}))
    expected_cos, expected_sin = judge(torch.zeros(1), torch.arange(2048)[None])

    cos, sin = architecture.rotary_tables(architecture.read(config), 2048)

    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (2048, head_size // 2)
    # A frequency may differ in its last bit, which 2048 positions magnify.
    np.testing.assert_allclose(cos, expected_cos[0, :, : head_size // 2].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(sin, expected_sin[0, :, : head_size // 2].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_those_of_the_model(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**LLAMA, "head_dim": 24, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))

    found = architecture.tensors(architecture.read(config))

    assert {name: list(shape) for name, shape in found} == {n: list(p.shape) for n, p in model.named_parameters()}
    assert [name for name, _ in found][:2] == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]


MOBILELLM: dict[str, Any] = {**LLAMA, "model_type": "mobilellm", "architectures": ["MobileLLMForCausalLM"]}


@pytest.mark.parametrize(
    "config",
    [
        MOBILELLM,
        {**MOBILELLM, "layer_repeats": 3, "tie_word_embeddings": False},
        {**MOBILELLM, "share_embedding": True, "tie_word_embeddings": False, "layer_sharing": True},
        {**MOBILELLM, "share_embedding": False, "tie_word_embeddings": False, "layer_sharing": False},
        {**MOBILELLM, "share_embedding": False, "layer_sharing": True, "layer_repeats": 4},
        {k: v for k, v in MOBILELLM.items() if k != "num_key_value_heads"}
        | {"num_attention_heads": 6, "hidden_size": 48},
    ],
)
def test_mobilellm_in_our_words_and_in_those_of_released_checkpoints(config: dict[str, Any]) -> None:
    from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM

    judge = MobileLLMConfig.from_dict(dict(config))
    a = architecture.read(config)
    assert (a.layers, a.layer_repeats, a.passes) == (3, judge.layer_repeats, len(judge.per_layer_config))
    assert (a.tied_embeddings, a.norm_eps, a.kv_heads) == (
        judge.tie_word_embeddings,
        judge.rms_norm_eps,
        judge.num_key_value_heads,
    )
    assert a.trained_context_length == judge.max_position_embeddings
    with torch.device("meta"):
        model = MobileLLMForCausalLM(judge)
    assert {name: list(shape) for name, shape in architecture.tensors(a)} == {
        n: list(p.shape) for n, p in model.named_parameters()
    }
    assert architecture.parameters(a) == model.num_parameters()
    assert len(architecture.linears(a)) == 3 * 7


def test_a_llama_shares_nothing_whatever_its_config_says() -> None:
    a = architecture.read({**LLAMA, "layer_sharing": True, "layer_repeats": 3, "share_embedding": True})
    assert (a.layer_repeats, a.passes, a.tied_embeddings) == (1, 3, False)


@pytest.mark.parametrize("change", [{"layer_sharing": True}, {"layer_repeats": 2}])
def test_the_released_cache_cannot_be_exported(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="kv_sharing = 'released'"):
        architecture.read({**MOBILELLM, "kv_sharing": "released", **change})
    assert architecture.read({**MOBILELLM, "kv_sharing": "released"}).layer_repeats == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_repeats": 0}, "layer_repeats is 0, not a whole number from 1 to 64"),
        ({"layer_repeats": 65}, "layer_repeats is 65"),
        ({"layer_sharing": 2}, "layer_sharing is 2, not true or false"),
        ({"share_embedding": "yes"}, "share_embedding is 'yes'"),
    ],
)
def test_a_mobilellm_that_lies_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture.read({**MOBILELLM, **change})


def test_the_linear_layers_in_the_order_of_computation() -> None:
    found = architecture.linears(architecture.read(LLAMA))

    assert [x.name for x in found[:7]] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(found) == 3 * 7
    down = found[-1]
    assert down == ("model.layers.2.mlp.down_proj", "down_proj", 2, 96, 64)


def test_a_sliding_window_limits_the_context() -> None:
    config = {**MISTRAL, "sliding_window": 128}

    assert architecture.read(config, context_length=128).trained_context_length == 128
    with pytest.raises(UnsupportedModel, match="a context of 129 tokens needs sliding-window attention"):
        architecture.read(config, context_length=129)


def test_a_llama_has_no_sliding_window_whatever_its_config_says() -> None:
    assert architecture.read({**LLAMA, "sliding_window": 16}).trained_context_length == 256


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, "model type 'qwen2' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"layer_types": 3}, "layers of types 3"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message) as caught:
        architecture.read({**LLAMA, **change}, where="folder/config.json")
    assert caught.value.where == "folder/config.json"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": None}, "model type None"),
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"vocab_size": "320"}, "vocab_size is '320'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a whole number from 1 to 4096"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 64 is not a multiple of 7"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 15}, "head size 15 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": "linear"}, "rope parameters are 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4 is not below high_freq_factor 4"),
    ],
)
def test_a_config_that_lies_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        architecture.read({**LLAMA, **change})


def test_a_rope_is_complete_before_it_is_used() -> None:
    import msgspec

    a = msgspec.structs.replace(architecture.read(LLAMA), rope=Rope(theta=1e4, type="linear"))
    with pytest.raises(CheckpointError, match="lacks one of its parameters"):
        architecture.rotary_tables(a, 4)
