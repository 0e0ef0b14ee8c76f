"""A model's weights in a folder, as Hugging Face and Meta lay them out, and the fingerprint of a base model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crayon_export import architecture as arch
from crayon_export import jsonfile, meta
from crayon_export.tensorfile import CHUNK_BYTES, Floats, Tensor, read_safetensors
from crayon_export.torchfile import read_torch
from crayon_runtime.errors import CheckpointError, UnsupportedModel
from crayon_runtime.manifest import Architecture


class Fingerprint:
    """The base fingerprint: SHA-256 over the sorted lines `name dtype shape sha256(bytes)`, joined by newlines.

    The dtype is safetensors' name, the shape is written as `4096,4096`, the bytes are those of the row-major tensor. A model that computes
    each block several times is another than one that computes it once, so there is the line `layer_repeats N`, too.

    Args:
        layer_repeats: how often in a row a block is computed.
    """

    def __init__(self, layer_repeats: int = 1) -> None:
        self._digests: dict[str, str] = {}
        self._lines = [f"layer_repeats {layer_repeats}"] if layer_repeats > 1 else []

    def add(self, tensor: Tensor, sha256: str) -> None:
        shape = ",".join(map(str, tensor.shape))
        self._digests[tensor.name] = f"{tensor.name} {tensor.dtype} {shape} {sha256}"

    def __contains__(self, name: str) -> bool:
        return name in self._digests

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(sorted([*self._digests.values(), *self._lines])).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The config and the tensors of a model; the tensors stay in their files.

    One pass over the files gives the weights and the fingerprint:

        checkpoint = Checkpoint.open(folder)
        architecture = read(checkpoint.config)
        checkpoint.check(architecture)
        fingerprint = Fingerprint(architecture.layer_repeats)
        for name, shape in tensors(architecture):
            for start, rows in checkpoint.stream(name, fingerprint=fingerprint):
                ...  # float32 [n, in_features]: rows start to start + n; yours to keep and to change
        fingerprint.hexdigest()
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the config and every header in a folder: model.safetensors, its shards and their index, or pytorch_model.bin.

        Raises:
            CheckpointError: a file is missing, damaged, or contradicts another.
            UnsupportedModel: a layout that cannot be read.
            MissingExtra: torch is needed and not installed.
        """
        path = Path(path)
        if not path.is_dir():
            what = "it is a file; a model is a folder" if path.exists() else "there is no such folder"
            raise CheckpointError(what, where=path, do="give the folder with config.json and the weights")
        if (path / "params.json").exists() and not (path / "config.json").exists():
            config, tensors = meta.read(path)
            return cls(path, config, tensors)
        return cls(path, jsonfile.read(path / "config.json"), _find_tensors(path))

    def tensor(self, name: str) -> Tensor:
        """One tensor; CheckpointError if there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"there is no tensor {name}", where=self.path) from None

    def check(self, architecture: Architecture) -> None:
        """Hold the tensors against what the config promises.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or there are layers that the config does not know.
            UnsupportedModel: a dtype cannot be read, or there are tensors that this architecture has no place for.
        """
        wanted = dict(arch.tensors(architecture))
        missing = [name for name in wanted if name not in self.tensors]
        if missing:
            raise self._missing(missing)
        for name, shape in wanted.items():
            tensor = self.tensors[name]
            tensor.check_dtype()
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{name} has the shape {list(tensor.shape)}; config.json makes it {list(shape)}",
                    where=tensor.file,
                    do="config.json and weights are of different models; download both again",
                )
        unknown = [name for name in self.tensors if name not in wanted and not _is_derived(name)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UnsupportedModel(
                f"it also holds {unknown[0]}{more}, for which a {architecture.model_type} model of"
                f" {architecture.layers} layers has no place",
                where=self.tensors[unknown[0]].file,
            )

    def stream(
        self, name: str, *, fingerprint: Fingerprint | None = None, max_bytes: int = CHUNK_BYTES
    ) -> Iterator[tuple[int, Floats]]:
        """Each row of a tensor once and in order, as pairs of the first row's index and float32 [n, ...].

        Args:
            fingerprint: the tensor is added to it when the last row has been taken, unless it is there already (a tied
                embedding is read twice and hashed once).
            max_bytes: of float32 in a chunk; a chunk has at least one row.

        Raises:
            CheckpointError: there is no such tensor, its file ends too early, or a value is NaN or infinite.
        """
        tensor = self.tensor(name)
        if fingerprint is None or name in fingerprint:
            yield from tensor.chunks(max_bytes=max_bytes)
            return
        sha256 = hashlib.sha256()
        yield from tensor.chunks(hash=sha256, max_bytes=max_bytes)
        fingerprint.add(tensor, sha256.hexdigest())

    def _missing(self, names: list[str]) -> CheckpointError:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        if names[0].removeprefix("model.") in self.tensors:
            return CheckpointError(
                f"tensor names lack their 'model.' prefix: {names[0].removeprefix('model.')}",
                where=self.path,
                do="save the model with its head (LlamaForCausalLM), not the bare LlamaModel",
            )
        return CheckpointError(
            f"the tensor {names[0]} is missing{more}",
            where=self.path,
            do="download the checkpoint again; if it is complete, its config.json is of another model",
        )


def fingerprint(
    checkpoint: Checkpoint, architecture: Architecture, on_bytes: Callable[[int], None] | None = None
) -> str:
    """The base fingerprint of a checkpoint, in a pass of its own over its files.

    Args:
        on_bytes: told how many bytes of the files were read since the last call.
    """
    total = Fingerprint(architecture.layer_repeats)
    for name, _ in arch.tensors(architecture):
        tensor, sha256 = checkpoint.tensor(name), hashlib.sha256()
        for bits in tensor.bit_chunks():
            sha256.update(bits.data)
            if on_bytes is not None:
                on_bytes(bits.nbytes)
        total.add(tensor, sha256.hexdigest())
    return total.hexdigest()


def _find_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from what transformers would load first."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", read_torch)):
        if (path / name).exists():
            return read(path / name)
        if (path / f"{name}.index.json").exists():
            return _read_shards(path / f"{name}.index.json", read)
    raise CheckpointError(
        "it holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards of them",
        where=path,
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path).tensors


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = jsonfile.read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("it has no weight_map", where=index)
    tensors: dict[str, Tensor] = {}
    for file in sorted({_shard_name(value, index) for value in weight_map.values()}):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"it names the shard {file}, which is not there", where=index, do="download it again")
        for name, tensor in read(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(f"both {tensors[name].file.name} and {file} hold {name}", where=index)
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{file} has no tensor {name}",
                where=index,
                do="download the checkpoint again; the index names this file for it",
            )
    return tensors


def _shard_name(value: Any, index: Path) -> str:
    if not isinstance(value, str) or value in ("", ".", "..") or set(value) & set("/\\\0"):
        raise CheckpointError(
            f"it names the shard {value!r:.200}, which is not a file beside it",
            where=index,
            do="do not use this checkpoint; whoever made it is broken or hostile",
        )
    return value


def _is_derived(name: str) -> bool:
    """Tensors that some checkpoints hold and nobody reads: rotary frequencies, and the copy of a tied head."""
    return name == arch.HEAD or name.endswith(".rotary_emb.inv_freq")
