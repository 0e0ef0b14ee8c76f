"""Judge: peft, which makes the adapters and merges them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crayon_export import lora
from crayon_export.architecture import read
from crayon_export.checkpoint import Checkpoint
from crayon_export.lora import PeftAdapter
from crayon_runtime.errors import AdapterError, CheckpointError, CrayonError, UnsupportedModel
from crayon_runtime.manifest import BASE_FINGERPRINT
from tests.export.models import tiny_adapter, tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(model, tmp_path_factory.mktemp("adapters") / "alice")


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def opened(path: Path, model: Path) -> PeftAdapter:
    found = PeftAdapter.open(path)
    lora.check(found, read(Checkpoint.open(model).config))
    return found


def key(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 8, "lora_alpha": 4, "target_modules": ALL},
        {"r": 3, "lora_alpha": 16, "use_rslora": True},
        {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"target_modules": ALL, "alpha_pattern": {"up_proj": 32, r".*\.1\.mlp\.down_proj": 1}, "use_rslora": True},
        {"target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "k_proj": 6}, "r": 5},
        {"target_modules": r".*\.layers\.1\.(self_attn|mlp)\.(q_proj|gate_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.1.self_attn.o_proj", "k_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": ALL, "exclude_modules": ["k_proj"]},
        {"lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
)
def test_merged_weights_are_those_of_peft(model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = tiny_adapter(model, tmp_path / "adapter", **config)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {n: p.detach().numpy().copy() for n, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, path).merge_and_unload()
    expected = {n: p.detach().numpy() for n, p in merged.named_parameters()}

    adapter = opened(path, model)

    changed = {n.removesuffix(".weight") for n in before if not np.array_equal(before[n], expected[n])}
    assert set(adapter.targets) == changed
    for module, target in adapter.targets.items():
        a, b = adapter.a(module), adapter.b(module)
        assert a.dtype == b.dtype == np.float32
        assert target.rank == a.shape[0] == b.shape[1]
        found = before[f"{module}.weight"] + adapter.scale(module) * (b @ a)
        np.testing.assert_allclose(found, expected[f"{module}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_half_precision(copy: Path, model: Path, dtype: torch.dtype) -> None:
    edit_tensors(copy, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    expected = load_file(copy / "adapter_model.safetensors")
    found = opened(copy, model)
    np.testing.assert_array_equal(found.a(Q), expected[key(Q, "A")].float().numpy())
    np.testing.assert_array_equal(found.b(Q), expected[key(Q, "B")].float().numpy())


def test_a_dtype_that_cannot_be_read(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({n: v.double() for n, v in t.items()}))
    with pytest.raises(UnsupportedModel, match="is stored as F64"):
        PeftAdapter.open(copy)


def test_name_hash_and_base(adapter: Path, tmp_path: Path) -> None:
    found = PeftAdapter.open(adapter)
    assert (found.name, found.base_fingerprint) == ("alice", None)
    assert found.sha256 == hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()

    path = Path(shutil.copytree(adapter, tmp_path / "..my first LoRA!"))
    file = path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", BASE_FINGERPRINT: "ab" * 32})
    found = PeftAdapter.open(path)
    assert (found.name, found.base_fingerprint) == ("my-first-LoRA-", "ab" * 32)


def test_a_pickled_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    expected, found = PeftAdapter.open(adapter), PeftAdapter.open(tmp_path)
    assert found.targets == expected.targets
    np.testing.assert_array_equal(found.b(Q), expected.b(Q))


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def test_a_pickled_adapter_that_is_not_weights_only(adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    torch.save({"x": _Code()}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="its pickle holds more than weights"):
        PeftAdapter.open(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_dora": True}, "DoRA is not supported"),
        ({"bias": "lora_only"}, r"trained biases are not supported \(bias = 'lora_only'\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"use_something_new": 3}, "use_something_new is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changes the base"),
        ({"peft_type": "IA3"}, "a PEFT adapter of type 'IA3' is not supported"),
        ({"peft_type": None}, "a PEFT adapter of type None is not supported"),
    ],
)
def test_what_is_no_plain_lora_is_named(copy: Path, config: dict[str, Any], message: str) -> None:
    edit_config(copy, **config)
    with pytest.raises(UnsupportedModel, match=message):
        PeftAdapter.open(copy)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_peft_saves_of_other_kinds_is_refused(model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    path = tiny_adapter(model, tmp_path / "adapter", **config)
    with pytest.raises(UnsupportedModel):
        PeftAdapter.open(path)


@pytest.mark.parametrize(
    "extra",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.lora_A.weight",
        f"base_model.model.{Q}.lora_magnitude_vector.weight",
        f"base_model.model.{Q}.base_layer.bias",
        f"base_model.model.{Q}.lora_A.default.weight",
        f"{Q}.lora_A.weight",
    ],
)
def test_tensors_of_other_kinds_are_named(copy: Path, extra: str) -> None:
    edit_tensors(copy, lambda t: t.update({extra: torch.ones(4, 64)}))
    with pytest.raises(UnsupportedModel, match=f"it holds '{extra}'"):
        PeftAdapter.open(copy)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"r": None}, "rank or alpha of .* is None"),
        ({"r": "4"}, "rank or alpha of .* is '4'"),
        ({"lora_alpha": None}, "rank or alpha of .* is None"),
        ({"lora_alpha": float("nan")}, "rank or alpha of .* is nan"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4, but adapter_config.json says 2"),
        ({"rank_pattern": {"(": 2}}, r"'\(\.\*.*is not a regular expression"),
        ({"rank_pattern": [2]}, "a pattern is"),
        ({"target_modules": ["q_proj"]}, "there are tensors for .*(v|down)_proj, which target_modules does not name"),
        ({"target_modules": r".*\.q_proj"}, "which target_modules does not name"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]},
            "names up_proj, for which there are no tensors",
        ),
        ({"target_modules": "["}, "is not a regular expression"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
    ],
)
def test_a_config_that_contradicts_the_tensors(copy: Path, config: dict[str, Any], message: str) -> None:
    edit_config(copy, **config)
    with pytest.raises(CheckpointError, match=message):
        PeftAdapter.open(copy)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(key(Q, "A")), "has lora_B but not the other"),
        (lambda t: t.pop(key(Q, "B")), "has lora_A but not the other"),
        (lambda t: t.update({key(Q, "B"): torch.ones(64, 5)}), r"A \[4, 64\] and B \[64, 5\] .* cannot be multiplied"),
        (lambda t: t.update({key(Q, "A"): torch.ones(4)}), "cannot be multiplied"),
        (lambda t: t.clear(), "it holds no tensors"),
    ],
)
def test_pairs_that_are_not_whole(copy: Path, edit: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        PeftAdapter.open(copy)


def test_an_adapter_of_another_width(copy: Path, model: Path) -> None:
    edit_tensors(copy, lambda t: t.update({key(Q, "A"): torch.ones(4, 65)}))
    with pytest.raises(AdapterError, match=f"it adapts {Q} from 65 to 64 features; this base has 64 to 64"):
        opened(copy, model)


def test_an_adapter_of_a_deeper_model(copy: Path, model: Path) -> None:
    far = Q.replace("0", "7")
    edit_tensors(copy, lambda t: t.update({key(far, "A"): torch.ones(4, 64), key(far, "B"): torch.ones(64, 4)}))
    with pytest.raises(AdapterError, match=rf"it targets {far}, which is not a linear layer of this base \(2 layers\)"):
        opened(copy, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(copy: Path, model: Path, value: float) -> None:
    edit_tensors(copy, lambda t: t[key(Q, "A")].__setitem__((1, 2), value))
    found = opened(copy, model)
    with pytest.raises(CheckpointError, match=r"lora_A.weight\[1, 2\] is NaN or infinite"):
        found.a(Q)


def test_folders_that_are_no_adapter(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        PeftAdapter.open(tmp_path / "absent")
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"it has neither adapter_model\.safetensors nor adapter_model\.bin"):
        PeftAdapter.open(tmp_path)


def test_a_truncated_file(copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CrayonError, match="7 bytes are missing at the end"):
        PeftAdapter.open(copy)
