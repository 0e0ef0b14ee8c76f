"""Judges: transformers, which saves and loads the same folders, and hashlib."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crayon_export.architecture import read, tensors
from crayon_export.checkpoint import Checkpoint, Fingerprint, fingerprint
from crayon_runtime.errors import CheckpointError, UnsupportedModel
from crayon_runtime.manifest import Architecture
from tests.export.models import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def opened(path: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = Checkpoint.open(path)
    architecture = read(checkpoint.config)
    checkpoint.check(architecture)
    return checkpoint, architecture


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    weights = load_file(path / "model.safetensors")
    weights.update({name.replace("__", "."): value for name, value in changes.items() if value is not None})
    for name in (name.replace("__", ".") for name, value in changes.items() if value is None):
        del weights[name]
    save_file(weights, path / "model.safetensors")


def transformers_weights(path: Path) -> dict[str, np.ndarray]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("mistral", False)])
def test_every_tensor_is_what_transformers_loads(
    tmp_path: Path, dtype: torch.dtype, shard_size: str, family: str, tied: bool
) -> None:
    path = tiny_llama(tmp_path, family=family, dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied)
    assert len(list(path.glob("*.safetensors"))) > (1 if shard_size == "50KB" else 0)
    expected = transformers_weights(path)

    checkpoint, architecture = opened(path)

    for name, shape in tensors(architecture):
        rows = np.concatenate([rows for _, rows in checkpoint.stream(name, max_bytes=4096)])
        assert rows.shape == shape
        np.testing.assert_array_equal(rows, expected[name])


def test_pickled_checkpoints(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    half = len(weights) // 2
    parts = {
        "pytorch_model-00001-of-00002.bin": list(weights)[:half],
        "pytorch_model-00002-of-00002.bin": list(weights)[half:],
    }
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
        shutil.copy(model / "config.json", tmp_path / folder)
    torch.save(weights, tmp_path / "one/pytorch_model.bin")
    for file, names in parts.items():
        torch.save({n: weights[n] for n in names}, tmp_path / "many" / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "many/pytorch_model.bin.index.json").write_text(json.dumps(index))

    expected = fingerprint(*opened(model))

    assert fingerprint(*opened(tmp_path / "one")) == expected
    assert fingerprint(*opened(tmp_path / "many")) == expected


def test_the_fingerprint_is_what_its_definition_says(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    lines = [
        f"{name} F32 {','.join(map(str, value.shape))} {hashlib.sha256(value.numpy().tobytes()).hexdigest()}"
        for name, value in weights.items()
    ]
    expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    checkpoint, architecture = opened(model)

    read_bytes: list[int] = []
    assert fingerprint(checkpoint, architecture, read_bytes.append) == expected
    assert sum(read_bytes) == sum(value.nbytes for value in weights.values())

    streamed = Fingerprint()
    for name, _ in tensors(architecture):
        for _, rows in checkpoint.stream(name, fingerprint=streamed, max_bytes=1000):
            rows[:] = 0  # the caller's to change
    assert streamed.hexdigest() == expected


def test_shards_and_order_do_not_change_the_fingerprint(model: Path, tmp_path: Path) -> None:
    assert fingerprint(*opened(tiny_llama(tmp_path, shard_size="30KB"))) == fingerprint(*opened(model))


def test_a_block_that_is_computed_again_makes_another_model(tmp_path: Path) -> None:
    once, twice = (tiny_llama(tmp_path / f"{n}", family="mobilellm", layer_repeats=n) for n in (1, 2))
    assert (once / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()
    checkpoint, architecture = opened(twice)
    lines = ["layer_repeats 2"]
    for name, tensor in checkpoint.tensors.items():
        content = b"".join(bits.tobytes() for bits in tensor.bit_chunks())
        shape = ",".join(map(str, tensor.shape))
        lines.append(f"{name} {tensor.dtype} {shape} {hashlib.sha256(content).hexdigest()}")
    expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert fingerprint(checkpoint, architecture) == expected != fingerprint(*opened(once))


def test_any_changed_weight_changes_the_fingerprint(model: Path, copy: Path) -> None:
    before = load_file(copy / "model.safetensors")["model.norm.weight"]
    edit_weights(copy, model__norm__weight=torch.cat([before[:-1], before[-1:] + 1e-6]))
    assert fingerprint(*opened(copy)) != fingerprint(*opened(model))


def test_a_tensor_read_twice_is_hashed_once(model: Path) -> None:
    checkpoint, _ = opened(model)
    total = Fingerprint()
    for _ in range(2):
        list(checkpoint.stream("model.norm.weight", fingerprint=total))
    once = Fingerprint()
    list(checkpoint.stream("model.norm.weight", fingerprint=once))
    assert total.hexdigest() == once.hexdigest()
    assert "model.norm.weight" in once


def test_a_stream_that_is_abandoned_is_not_in_the_fingerprint(model: Path) -> None:
    checkpoint, _ = opened(model)
    total = Fingerprint()
    stream = checkpoint.stream("model.embed_tokens.weight", fingerprint=total, max_bytes=1000)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert "model.embed_tokens.weight" not in total


def test_a_tied_model_may_still_hold_its_head(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, tie_word_embeddings=True)
    before = fingerprint(*opened(path))
    edit_weights(path, lm_head__weight=torch.zeros(320, 64))
    assert fingerprint(*opened(path)) == before


def test_rotary_frequencies_of_old_checkpoints_are_ignored(copy: Path) -> None:
    before = fingerprint(*opened(copy))
    edit_weights(copy, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert fingerprint(*opened(copy)) == before


def test_nan_is_found_while_streaming(copy: Path) -> None:
    weight = load_file(copy / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weight[90, 3] = float("nan")
    edit_weights(copy, model__layers__1__mlp__up_proj__weight=weight)
    checkpoint, _ = opened(copy)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight\[90, 3\] is NaN or infinite"):
        list(checkpoint.stream("model.layers.1.mlp.up_proj.weight", fingerprint=Fingerprint()))


def test_a_missing_tensor(copy: Path) -> None:
    edit_weights(copy, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match="the tensor model.layers.1.mlp.up_proj.weight is missing and 1 others"):
        opened(copy)


def test_a_misshapen_tensor(copy: Path) -> None:
    edit_weights(copy, model__layers__0__self_attn__k_proj__weight=torch.ones(64, 32))
    with pytest.raises(
        CheckpointError, match=r"k_proj.weight has the shape \[64, 32\]; config.json makes it \[32, 64\]"
    ) as e:
        opened(copy)
    assert e.value.where == str(copy / "model.safetensors")


@pytest.mark.parametrize("dtype, name", [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_dtype_that_cannot_be_read(copy: Path, dtype: torch.dtype, name: str) -> None:
    edit_weights(copy, model__norm__weight=torch.ones(64).to(dtype))
    with pytest.raises(UnsupportedModel, match=f"model.norm.weight is stored as {name}; F32, F16 and BF16 can be read"):
        opened(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 128}, r"embed_tokens.weight has the shape \[320, 64\]; config.json makes it \[320, 128\]"),
        ({"vocab_size": 321}, r"config.json makes it \[321, 64\]"),
        ({"num_hidden_layers": 3}, "the tensor model.layers.2.input_layernorm.weight is missing and 8 others"),
        ({"num_hidden_layers": 1}, r"it also holds model.layers.1.\S+ and 8 more, for which a llama model of 1 layers"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has the shape \[32, 64\]; config.json makes it \[64, 64\]"),
    ],
)
def test_a_config_that_lies_about_shapes(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_config(copy, **change)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        opened(copy)


def test_biases_that_the_config_does_not_mention(copy: Path) -> None:
    edit_weights(copy, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(UnsupportedModel, match=r"it also holds model.layers.0.self_attn.q_proj.bias, for which"):
        opened(copy)


def test_a_model_without_its_head(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({n.removeprefix("model."): v for n, v in weights.items()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="lack their 'model.' prefix: embed_tokens.weight"):
        opened(copy)


def test_a_tensor_that_does_not_exist(model: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no tensor nonsense"):
        list(Checkpoint.open(model).stream("nonsense"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "sharded", shard_size="100KB")


def edit_index(path: Path, **changes: Any) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update(changes)
    file.write_text(json.dumps(index))


def test_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckpointError, match=f"it names the shard {first.name}, which is not there") as caught:
        Checkpoint.open(sharded)
    assert caught.value.where == str(sharded / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b", 3, None]
)
def test_an_index_that_leaves_its_folder(sharded: Path, name: Any) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, sharded.parent / "secret.safetensors")
    edit_index(sharded, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["model.norm.weight", "invented"])
def test_an_index_that_names_a_shard_without_the_tensor(sharded: Path, name: str) -> None:
    file = next(f.name for f in sorted(sharded.glob("*.safetensors")) if name not in load_file(f))
    edit_index(sharded, **{name: file})
    with pytest.raises(CheckpointError, match=f"{file} has no tensor {name}"):
        Checkpoint.open(sharded)


def test_two_shards_with_the_same_tensor(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.ones(2)}, second)
    with pytest.raises(CheckpointError, match=f"both {first.name} and {second.name} hold {name}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]", "{", '{"a": 1, "a": 2}'])
def test_an_index_that_is_malformed(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(sharded)


def test_what_is_not_a_model_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="it is a file; a model is a folder"):
        Checkpoint.open(model / "config.json")
    with pytest.raises(CheckpointError, match="there is no config.json"):
        Checkpoint.open(tmp_path)
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="it holds no weights"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"model_type": "llama", "model_type": "llama"}']
)
def test_a_config_that_is_malformed(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(copy)


def test_a_config_of_absurd_size(copy: Path) -> None:
    with (copy / "config.json").open("r+b") as f:
        f.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="it is 1073741824 bytes of JSON"):
        Checkpoint.open(copy)
