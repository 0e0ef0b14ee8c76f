"""Tensors in PyTorch's .bin and .pth files, found without running what else their pickles may hold.

torch reads the pickle with `weights_only=True` onto the meta device, which tells where each tensor's bytes lie; they are
then read as those of a safetensors file are.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from crayon_export.tensorfile import Tensor
from crayon_runtime.errors import CheckpointError, MissingExtra, UnsupportedModel


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict saved by torch.

    Raises:
        MissingExtra: torch is not installed.
        CheckpointError: the file is damaged, holds anything but tensors, or tensors that are not contiguous.
        UnsupportedModel: it is in the format from before torch 1.6.
    """
    _check_stored(path)
    state = _load(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"it holds {type(state).__name__}, not a state dict", where=path)
    return {str(name): _tensor(str(name), value, path) for name, value in state.items()}


def _check_stored(path: Path) -> None:
    """torch never compresses; a file that is compressed would be read as noise."""
    try:
        with path.open("rb") as f:
            if f.read(2) == b"\x80\x02":
                raise UnsupportedModel(
                    "it is in torch's format from before 1.6",
                    where=path,
                    do="load it and save it again: torch.save(torch.load(path, weights_only=True), path)",
                )
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError("it is a compressed archive, which torch does not write", where=path)
    except zipfile.BadZipFile as e:
        raise CheckpointError(f"not a file saved by torch: {e}", where=path, do="download the file again") from None
    except OSError as e:
        raise CheckpointError(f"cannot read it: {e.strerror}", where=path) from None


def _load(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtra("pth", f"reading {path.name}") from None
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"its pickle holds more than weights: {_reason(e)}",
            where=path,
            do="loading it could run code; get the model as safetensors",
        ) from None
    except Exception as e:  # noqa: BLE001 - a broken pickle may raise anything
        raise CheckpointError(f"torch cannot read it: {_reason(e)}", where=path, do="download the file again") from None


def _reason(error: Exception) -> str:
    """The line of a long torch message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "unsupported" in line.lower()), lines[0] if lines else type(error).__name__)


def _tensor(name: str, value: Any, path: Path) -> Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{name} is a {type(value).__name__}, not a tensor", where=path)
    if not value.is_contiguous():
        raise CheckpointError(
            f"{name} is not contiguous: its strides are {value.stride()}",
            where=path,
            do="save it again with .contiguous()",
        )
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype = names.get(value.dtype, str(value.dtype).removeprefix("torch."))
    start: int | None = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"torch {torch.__version__} does not tell where its tensors lie", where=path, do="use torch 2.11 or newer"
        )
    return Tensor(name, dtype, tuple(value.shape), path, start + int(value.storage_offset()) * value.itemsize)
