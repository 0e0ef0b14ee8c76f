"""Judge: the bundle that an export writes, and arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from crayon_export import estimate as module
from crayon_export.estimate import DEVICES, EFFICIENCY, LAYER_SECONDS, THIS_MACHINE, estimate
from crayon_export.exporter import run
from crayon_export.plan import plan
from crayon_runtime.errors import CheckpointError, InvalidInput
from tests.export.models import tiny_llama, tiny_tokenizer

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def llama_7b(tmp_path: Path) -> Path:
    """A config alone: no weights are needed."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 128}, {"quantize": "int8"}, {"quantize": "none"}, {"context_length": 64, "kv_dtype": "fp16"}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_on_disk_is_that_of_an_export(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    model = tiny_tokenizer(tiny_llama(tmp_path / "model", tie_word_embeddings=tied))

    bundle = run(plan(model, **options), tmp_path / "bundle").bundle

    graph = onnx.load(str(bundle.file("model.onnx")), load_external_data=False).graph
    places = [{e.key: e.value for e in tensor.external_data} for tensor in graph.initializer if tensor.external_data]
    lengths = {place["offset"]: int(place["length"]) for place in places}  # of which two tensors may be one
    assert estimate(model, device="raspberry-pi-5", **options).disk == sum(lengths.values())


def test_llama_7b_by_hand(llama_7b: Path) -> None:
    found = estimate(
        llama_7b, quantize="int4", group_size=128, context_length=1024, kv_dtype="fp16", device="raspberry-pi-5"
    )

    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    head = 32000 * 4096
    norms = 65 * 4096
    weights = (linear + head) // 2 + (linear + head) // 128 * 4 + 4 * norms
    assert found.parameters == linear + 2 * head + norms == 6_738_415_616
    assert found.disk == weights + 2 * head + 1024 * 128 * 2
    assert found.kv_cache == 2 * 32 * 4096 * 1024 * 2
    assert found.read_per_token == weights + found.kv_cache // 2
    assert found.ram == found.disk + found.kv_cache + found.activations + found.runtime
    (rate,) = found.rates
    seconds = found.read_per_token / (EFFICIENCY * DEVICES["raspberry-pi-5"].bandwidth) + 32 * LAYER_SECONDS
    assert rate.tokens_per_second == pytest.approx(1 / seconds)
    assert 1 < rate.tokens_per_second < 3


def test_shared_layers_take_the_memory_of_the_blocks_and_the_cache_of_the_passes() -> None:
    from crayon_export.architecture import read

    mobilellm = {
        **LLAMA_7B,
        "model_type": "mobilellm",
        "architectures": ["MobileLLMForCausalLM"],
        "num_key_value_heads": 32,
    }
    plain, shared = (estimate(read({**mobilellm, "layer_repeats": n}), device="pixel-8") for n in (1, 2))
    assert (shared.parameters, shared.disk) == (plain.parameters, plain.disk)
    assert shared.kv_cache == 2 * plain.kv_cache
    assert shared.read_per_token - plain.read_per_token == plain.kv_cache // 2


def test_every_device_and_this_machine(llama_7b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_bandwidth", lambda nbytes, threads: 50e9)
    found = estimate(llama_7b)
    assert [rate.device for rate in found.rates] == [*DEVICES, THIS_MACHINE]
    assert all(rate.source for rate in found.rates)
    assert found.rates[-1].bandwidth == 50e9
    text = found.to_text()
    assert "6738.4 M parameters, int4, context 2048" in text
    assert "orange-pi-5" in text
    assert json.loads(json.dumps(found.to_dict()))["ram"] == found.ram


def test_one_device_measures_nothing(llama_7b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "read_bandwidth")
    assert [rate.device for rate in estimate(llama_7b, device="pixel-8").rates] == ["pixel-8"]


def test_this_machine_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 1, "vocab_size": 100}))
    (rate,) = estimate(tmp_path, device=THIS_MACHINE).rates
    assert rate.bandwidth > 1e8
    assert rate.source.startswith("measured: a streaming read by")


def test_an_architecture_instead_of_a_model(llama_7b: Path) -> None:
    from crayon_export.architecture import read

    assert estimate(read(LLAMA_7B), device="pixel-8") == estimate(llama_7b, device="pixel-8")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantize": "int3"}, "quantize is 'int3', not int4, int8 or none"),
        ({"group_size": 48}, "the group size 48 is not one of"),
        ({"kv_dtype": "fp64"}, "kv_dtype is 'fp64', not one of fp32, fp16, int8"),
        ({"context_length": 0}, "the context length is 0"),
        ({"device": "abacus"}, "there is no device 'abacus'"),
    ],
)
def test_options_that_do_not_exist(llama_7b: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        estimate(llama_7b, **options)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        estimate(tmp_path)
