"""Judge: the same model as transformers saves it; its weights are permuted as transformers' own converter does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crayon_export.architecture import read, tensors
from crayon_export.checkpoint import Checkpoint, fingerprint
from crayon_export.meta import _NAMES
from crayon_runtime.errors import CheckpointError, UnsupportedModel
from tests.export.models import tiny_llama

HEADS, KV_HEADS, HIDDEN = 4, 2, 64
PARAMS = {"dim": HIDDEN, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-5, "vocab_size": -1}


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `permute` in transformers' convert_llama_weights_to_hf."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def meta_layout(hub_layout: Path, path: Path, **params: Any) -> Path:
    """Write a model as Meta would."""
    original = {new: old for old, new in _NAMES.items()}
    state: dict[str, torch.Tensor] = {"rope.freqs": torch.ones(8)}
    for name, weight in load_file(hub_layout / "model.safetensors").items():
        module = name.removesuffix(".weight")
        layer = ""
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            layer = f"layers.{number}."
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = interleave(weight, HEADS if "q_proj" in module else KV_HEADS)
        state[f"{layer}{original[module]}.weight"] = weight
    path.mkdir()
    torch.save(state, path / "consolidated.00.pth")
    (path / "params.json").write_text(json.dumps({**PARAMS, **params}))
    return path


@pytest.fixture(scope="module")
def hub_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), dtype=torch.float16, rms_norm_eps=1e-5)


def test_weights_config_and_fingerprint_are_those_of_the_other_layout(hub_layout: Path, tmp_path: Path) -> None:
    expected = Checkpoint.open(hub_layout)
    found = Checkpoint.open(meta_layout(hub_layout, tmp_path / "meta"))

    a, b = read(expected.config), read(found.config)

    found.check(b)
    assert (b.layers, b.heads, b.kv_heads, b.ffn_size, b.vocab_size) == (
        a.layers,
        a.heads,
        a.kv_heads,
        a.ffn_size,
        a.vocab_size,
    )
    assert (b.norm_eps, b.rope.theta, b.tied_embeddings) == (a.norm_eps, a.rope.theta, a.tied_embeddings)
    for name, _ in tensors(a):
        np.testing.assert_array_equal(found.tensor(name).read(), expected.tensor(name).read())
        rows = np.concatenate([rows for _, rows in found.stream(name, max_bytes=3 * 4 * HIDDEN)])
        np.testing.assert_array_equal(rows, expected.tensor(name).read())
    assert fingerprint(found, b) == fingerprint(expected, a)


def test_several_parts_are_refused(hub_layout: Path, tmp_path: Path) -> None:
    path = meta_layout(hub_layout, tmp_path / "meta")
    (path / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"2 consolidated\.\*\.pth files; one can be read"):
        Checkpoint.open(path)


def test_the_rope_scaling_of_llama_3_1_is_refused(hub_layout: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="use_scaled_rope"):
        Checkpoint.open(meta_layout(hub_layout, tmp_path / "meta", use_scaled_rope=True))


@pytest.mark.parametrize(
    "params, message",
    [
        ({"n_heads": 0}, "is not a multiple of n_heads 0"),
        ({"n_heads": 7}, "dim 64 is not a multiple of n_heads 7"),
        ({"dim": "64"}, "dim '64'"),
        ({"n_heads": 32}, r"head size 2|has the shape"),
    ],
)
def test_params_that_lie(hub_layout: Path, tmp_path: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint = Checkpoint.open(meta_layout(hub_layout, tmp_path / "meta", **params))
        checkpoint.check(read(checkpoint.config))


def test_a_folder_with_params_alone(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(CheckpointError, match=r"there is no consolidated\.00\.pth"):
        Checkpoint.open(tmp_path)


def test_params_without_what_they_must_have(hub_layout: Path, tmp_path: Path) -> None:
    path = meta_layout(hub_layout, tmp_path / "meta")
    (path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"have no dim"):
        Checkpoint.open(path)
