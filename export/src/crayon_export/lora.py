"""PEFT's LoRA adapters: read, and held against themselves and against the base they are offered to.

What PEFT adds to a linear layer's W [out, in] is `scale * B @ A` with A [r, in] and B [out, r].
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crayon_export import jsonfile
from crayon_export.architecture import linears
from crayon_export.tensorfile import Floats, Tensor, read_safetensors
from crayon_export.torchfile import read_torch
from crayon_runtime.errors import AdapterError, CheckpointError, UnsupportedModel
from crayon_runtime.manifest import BASE_FINGERPRINT, Architecture

# Fields of an adapter_config.json that may have any value: they are read below, or do not change what the adapter computes.
_HARMLESS = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_dropout",
        "init_lora_weights",
        "runtime_config",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "ensure_weight_tying",
    ),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
# Other initializations also change the weights of the base, which then is not the published one.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """How one linear layer is adapted."""

    rank: int
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA in a folder as PEFT saves it. Its tensors stay in their file until they are asked for."""

    path: Path
    name: str
    """The folder's name, as a manifest may hold it."""
    file: Path
    """adapter_model.safetensors, or adapter_model.bin."""
    targets: dict[str, Lora]
    """By module, as model.layers.0.self_attn.q_proj."""
    base_fingerprint: str | None
    """Of the only base that it fits, where its file says so."""
    tensors: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def open(cls, path: str | Path) -> PeftAdapter:
        """Read the config and the header of an adapter.

        Raises:
            UnsupportedModel: it is no plain LoRA of linear layers; what it is instead is named.
            CheckpointError: a file is missing or damaged, or config and tensors contradict each other.
            MissingExtra: it is an adapter_model.bin, and torch is not installed.
        """
        path = Path(path)
        where = path / "adapter_config.json"
        config = jsonfile.read(where)
        _check_plain(config, where)
        file, tensors, fingerprint = _read_tensors(path)
        pairs = _pairs(tensors, file)
        _check_targets(config, pairs, where)
        targets = {module: _lora(module, a.shape[0], config, where) for module, (a, _) in pairs.items()}
        return cls(path, _name(path), file, targets, fingerprint, pairs)

    def a(self, module: str) -> Floats:
        """float32 [r, in]; CheckpointError if a value is NaN or infinite."""
        return self.tensors[module][0].read()

    def b(self, module: str) -> Floats:
        """float32 [out, r], not scaled; CheckpointError if a value is NaN or infinite."""
        return self.tensors[module][1].read()

    def scale(self, module: str) -> float:
        return self.targets[module].scale

    @cached_property
    def sha256(self) -> str:
        """Of the file that holds the tensors."""
        with self.file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


def check(adapter: PeftAdapter, architecture: Architecture) -> None:
    """Refuse an adapter that does not fit a base: AdapterError for a layer that it does not have, or another shape."""
    known = {linear.module: linear for linear in linears(architecture)}
    for module, (a, b) in adapter.tensors.items():
        linear = known.get(module)
        if linear is None:
            raise AdapterError(
                f"it targets {module}, which is not a linear layer of this base ({architecture.layers} layers)",
                where=adapter.path,
                do="use the base model that the adapter was trained for",
            )
        if (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features):
            raise AdapterError(
                f"it adapts {module} from {a.shape[1]} to {b.shape[0]} features;"
                f" this base has {linear.in_features} to {linear.out_features}",
                where=adapter.path,
                do="use the base model that the adapter was trained for",
            )


def _check_plain(config: dict[str, Any], where: Path) -> None:
    """Refuse what a plain LoRA would not compute, including fields of PEFT versions to come."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(f"a PEFT adapter of type {kind!r:.40} is not supported; LORA is", where=where)
    if config.get("use_dora"):
        raise UnsupportedModel("DoRA is not supported", where=where, do="train a plain LoRA (use_dora=False)")
    if config.get("bias", "none") != "none":
        raise UnsupportedModel(
            f"trained biases are not supported (bias = {config['bias']!r:.40})",
            where=where,
            do="train with bias='none'",
        )
    if config.get("init_lora_weights") not in _INITIALIZATIONS:
        raise UnsupportedModel(
            f"init_lora_weights = {config['init_lora_weights']!r:.40} changes the base model's own weights",
            where=where,
            do="save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for field, value in config.items():
        if value and field not in _HARMLESS and field != "bias":
            raise UnsupportedModel(f"{field} is not supported (it is {value!r:.80})", where=where)


def _read_tensors(path: Path) -> tuple[Path, dict[str, Tensor], str | None]:
    safetensors, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if safetensors.exists():
        tensors, metadata = read_safetensors(safetensors)
        return safetensors, tensors, metadata.get(BASE_FINGERPRINT)
    if pickled.exists():
        return pickled, read_torch(pickled), None
    raise CheckpointError("it has neither adapter_model.safetensors nor adapter_model.bin", where=path)


def _pairs(tensors: dict[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted module."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None or match[1] == "lm_head":
            raise UnsupportedModel(
                f"it holds {key!r:.200}; only LoRA of the linear layers in the decoder's blocks is supported",
                where=file,
                do="train without modules_to_save, and without lm_head and embeddings among the targets",
            )
        tensor.check_dtype()
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise CheckpointError("it holds no tensors", where=file)
    for module, pair in found.items():
        if len(pair) == 1:
            raise CheckpointError(f"{module} has lora_{next(iter(pair))} but not the other of A and B", where=file)
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"A {list(a.shape)} and B {list(b.shape)} of {module} cannot be multiplied as B @ A", where=file
            )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _check_targets(config: dict[str, Any], modules: Iterable[str], where: Path) -> None:
    """PEFT ignores tensors that `target_modules` does not name, and leaves out targets without tensors; we say so."""
    targets = config.get("target_modules")
    if targets in (None, "all-linear"):
        return
    if isinstance(targets, str):
        unnamed = [module for module in modules if not _fullmatch(targets, module, where)]
        absent: list[str] = []
    elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        unnamed = [module for module in modules if not any(f".{module}".endswith(f".{t}") for t in targets)]
        absent = [t for t in targets if not any(f".{module}".endswith(f".{t}") for module in modules)]
    else:
        raise CheckpointError(f"target_modules is {targets!r:.80}", where=where)
    if unnamed:
        raise CheckpointError(f"there are tensors for {unnamed[0]}, which target_modules does not name", where=where)
    if absent and not config.get("exclude_modules"):
        raise CheckpointError(f"target_modules names {absent[0]}, for which there are no tensors", where=where)


def _lora(module: str, stored_rank: int, config: dict[str, Any], where: Path) -> Lora:
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"), where)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"), where)
    if rank != stored_rank or rank < 1:
        raise CheckpointError(f"{module} has rank {stored_rank}, but adapter_config.json says {rank:g}", where=where)
    return Lora(int(rank), alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Any, module: str, default: Any, where: Path) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT's `get_pattern_key` finds it."""
    if not isinstance(patterns or {}, dict):
        raise CheckpointError(f"a pattern is {patterns!r:.80}, not an object", where=where)
    matching = (v for key, v in (patterns or {}).items() if _fullmatch(rf"(.*\.)?({key})", module, where))
    value = next(matching, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise CheckpointError(f"rank or alpha of {module} is {value!r:.40}", where=where)
    return value


def _fullmatch(pattern: str, module: str, where: Path) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as e:
        raise CheckpointError(f"{pattern!r:.200} is not a regular expression: {e}", where=where) from None


def _name(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip("._-")
    return name[:128] or "adapter"
