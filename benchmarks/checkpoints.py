"""Checkpoints of real shapes that take almost no disk, for measuring memory and time.

Every tensor is a hole in a sparse file but for its first elements, which are random, so that hashes differ. Norms are nearly ones. The
outputs of such a model mean nothing; how long they take does not depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from crayon_export.architecture import linears, read, tensors
from crayon_runtime.manifest import Architecture

SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
    },
    "tinyllama-1.1b": {
        "num_hidden_layers": 22, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
    },
}  # fmt: skip
"""Of models that `crayon_server.models` has no configuration of."""

_RANDOM_ELEMENTS = 4096
_SHARD_BYTES = 5_000_000_000


def sparse_checkpoint(folder: Path, name: str, *, layers: int | None = None, adapter_rank: int = 16) -> Path:
    """Write a float16 checkpoint, and a dense PEFT adapter for all linears under `adapter/`. Returns the folder.

    Args:
        name: of `SHAPES`, or of `crayon_server.models.ARCHITECTURES`.
    """
    path = folder / (name if layers is None else f"{name}-{layers}-layers")
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True)
    config = _config(name) | ({"num_hidden_layers": layers} if layers else {})
    architecture = read(config)
    rng = np.random.default_rng(0)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for tensor in tensors(architecture):
        nbytes = 2 * int(np.prod(tensor.shape))
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    index = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(path / file, entries, rng)
        index.update({tensor: file for tensor, _ in entries})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    random_adapter(path / "adapter", architecture, adapter_rank)
    (path / "config.json").write_text(json.dumps(config))
    return path


def _config(name: str) -> dict[str, Any]:
    if name not in SHAPES:
        from crayon_server import models

        return models.config(name).to_dict()
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, **SHAPES[name],
    }  # fmt: skip


def random_adapter(path: Path, architecture: Architecture, rank: int) -> Path:
    """Write a dense PEFT adapter of all linear layers, whose update has about a tenth of a usual weight's size."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    tensors = {}
    for linear in linears(architecture):
        key = f"base_model.model.{linear.module}"
        a = rng.standard_normal((rank, linear.in_features), np.float32) / np.sqrt(linear.in_features)
        b = rng.standard_normal((linear.out_features, rank), np.float32) * 0.01
        tensors |= {f"{key}.lora_A.weight": a.astype(np.float32), f"{key}.lora_B.weight": b}
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": sorted({linear.name for linear in linears(architecture)}),
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _write(path: Path, entries: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    """A float16 safetensors file with holes; safetensors itself cannot write one."""
    header, offset = {}, 0
    for name, shape in entries:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        for name, shape in entries:
            file.seek(start + header[name]["data_offsets"][0])
            elements = int(np.prod(shape))
            norm = len(shape) == 1
            values = rng.standard_normal(elements if norm else min(elements, _RANDOM_ELEMENTS)) * 0.02 + norm
            file.write(values.astype(np.float16).tobytes())
