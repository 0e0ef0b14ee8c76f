"""A safetensors file, mapped into memory: its tensors are views of the file, and take memory only while they are used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crayon_runtime.errors import IntegrityError

if TYPE_CHECKING:
    import numpy.typing as npt

    Mapped = dict[str, npt.NDArray[Any]]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4"}
_LARGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""


def read_mapped(path: Path) -> tuple[Mapped, dict[str, str]]:
    """The tensors of a file by name, read-only float32, float16 or int32, and its metadata.

    Raises:
        IntegrityError: the file cannot be read, is no safetensors file, or holds another dtype.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)  # whose views are cheaper
        header = _header(data)
        metadata = header.pop("__metadata__", {})
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        return {name: _view(data[start:], name, entry) for name, entry in header.items()}, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise IntegrityError(f"not a safetensors file that can be used: {e}", where=path, do="fetch it again") from e


def _header(data: npt.NDArray[np.uint8]) -> dict[str, Any]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= min(len(data) - 8, _LARGEST_HEADER):
        raise ValueError(f"its header has {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length].tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header


def _view(data: npt.NDArray[np.uint8], name: str, entry: dict[str, Any]) -> npt.NDArray[Any]:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}; float32, float16 and int32 can be read")
    dtype, shape, (start, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} does not fit bytes {start} to {end}")
    return data[start:end].view(dtype).reshape(shape)
