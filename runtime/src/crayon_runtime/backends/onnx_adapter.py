"""The `.onnx_adapter` file, written as a stream: one tensor in memory at a time, whatever the size of the model.

ONNX Runtime's own writer (`AdapterFormat.export_adapter`) keeps every tensor, a copy of each, and the file. The format is a
FlatBuffer of its `adapter_schema.fbs`:

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8] (force_align: 8); }
    table Adapter   { format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]; }
    root_type Adapter; file_identifier "TORT";

A FlatBuffer's offsets point forward, so all that is small comes first, and the tensors follow in order.

A matrix is stored as float32 (`fp32`), as float16 (`fp16`), or as int8 with a float32 scale for each rank (`int8`, symmetric):
MODULE.lora_A.weight [in, r] with MODULE.lora_A.scale [r], MODULE.lora_B.weight [r, out] with MODULE.lora_B.scale [r].
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from crayon_runtime import half
from crayon_runtime.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from crayon_runtime.manifest import AdapterDtype

    Floats = npt.NDArray[np.float32]

IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
# Size of the vtable and of the table, then where each of the four fields is in the table.
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
_LARGEST = (1 << 31) - 1  # bytes that FlatBuffers can address

_ONNX_TYPES: dict[np.dtype[Any], int] = {np.dtype("<f4"): 1, np.dtype("i1"): 3, np.dtype("<f2"): 10}
_STORED: dict[AdapterDtype, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1"),
}  # fmt: skip
_LARGEST_INT8 = 127
_LARGEST_SCALE = np.finfo(np.float32).max / 128

Tensor = tuple[tuple[int, int], "Callable[[], npt.NDArray[np.float32]]"]
"""The shape of a matrix, and what computes it when its turn comes."""


class _Output(Protocol):
    def write(self, data: bytes, /) -> int: ...


def write_onnx_adapter(file: _Output, tensors: Mapping[str, Tensor], dtype: AdapterDtype = "fp32") -> None:
    """Write float32 tensors, by the name of the input that each is bound to.

    Args:
        file: open for sequential binary writing.
        tensors: `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out].
        dtype: what they are stored in.

    Raises:
        AdapterError: there is more than the format holds (2 GiB), or a tensor is not what its shape says, or holds what the dtype
            cannot.
    """
    parameters = [p for name, (shape, _) in tensors.items() for p in _parameters(name, shape, dtype)]
    file.write(_header(parameters))
    for name, (shape, compute) in tensors.items():
        matrix = compute()
        if matrix.shape != shape:
            raise AdapterError(f"{name} has shape {matrix.shape}, not {shape}")
        for array in _encoded(name, matrix, dtype):
            file.write(struct.pack("<4xI", array.nbytes))
            file.write(array.tobytes())
            file.write(bytes(-array.nbytes % 8))


def read_matrix(name: str, stored: npt.NDArray[Any], scale: Floats | None, *, where: Path) -> Floats:
    """A matrix as float32, from what a file holds of it.

    Args:
        stored: float32, float16 or int8, `MODULE.lora_A.weight` [in, r] or `MODULE.lora_B.weight` [r, out].
        scale: float32 [r], of int8.

    Raises:
        AdapterError: it is no matrix, holds NaN or infinity, or the scales are not its own.
    """
    if stored.ndim != 2 or (scale is not None and scale.shape != (stored.shape[1 if _is_a(name) else 0],)):
        raise AdapterError(f"{name} has shape {list(stored.shape)}, or not one scale for each rank", where=where)
    matrix = stored if stored.dtype == np.float32 else np.empty(stored.shape, np.float32)
    if stored.dtype == np.float16:
        usable = half.to_float(stored, matrix)
    elif scale is not None:
        np.multiply(stored, _along_rank(name, scale), out=matrix)
        usable = bool((scale >= 0).all() and (scale <= _LARGEST_SCALE).all())
    else:
        usable = bool(np.isfinite(matrix).all())
    if not usable:
        raise AdapterError(
            f"{name} holds NaN or infinity, or a scale that cannot be",
            where=where,
            do="fetch or convert the adapter again",
        )
    return matrix


def scale_name(name: str) -> str:
    """What the scales of an int8 matrix are called."""
    return f"{name.removesuffix('.weight')}.scale"


Parameter = tuple[str, "np.dtype[Any]", tuple[int, ...]]


def _parameters(name: str, shape: tuple[int, int], dtype: AdapterDtype) -> list[Parameter]:
    """What of the format a matrix takes: name, dtype and shape of each."""
    rank = shape[1] if _is_a(name) else shape[0]
    scale: list[Parameter] = [(scale_name(name), _STORED["fp32"], (rank,))] if dtype == "int8" else []
    return [(name, _STORED[dtype], shape), *scale]


def _encoded(name: str, matrix: Floats, dtype: AdapterDtype) -> list[npt.NDArray[Any]]:
    if dtype == "fp32":
        return [np.ascontiguousarray(matrix, "<f4")]
    if dtype == "fp16":
        rounded = half.from_float(matrix)
        if rounded is None:
            raise AdapterError(f"{name} holds values that float16 cannot", do="store the adapter as fp32")
        return [np.ascontiguousarray(rounded, "<f2")]
    scale = np.abs(matrix).max(axis=0 if _is_a(name) else 1) / np.float32(_LARGEST_INT8)
    if not np.isfinite(scale).all():
        raise AdapterError(f"{name} holds NaN or infinity")
    steps = np.divide(matrix, _along_rank(name, np.where(scale > 0, scale, 1)))
    return [np.ascontiguousarray(np.rint(steps, out=steps).astype(np.int8)), scale.astype("<f4")]


def _is_a(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def _along_rank(name: str, scale: Floats) -> Floats:
    return scale if _is_a(name) else scale[:, None]


def _header(parameters: list[Parameter]) -> bytes:
    """Everything before the data of the first tensor."""
    header = bytearray()

    def align(to: int, then: int = 0) -> int:
        """Pad until `then` bytes further on is a multiple of `to`; returns the position."""
        header.extend(bytes(-(len(header) + then) % to))
        return len(header)

    def point(field: int, target: int) -> None:
        struct.pack_into("<I", header, field, target - field)

    header += struct.pack("<I4s", 0, IDENTIFIER)
    vtable = len(header)
    header += _VTABLE
    root = align(4)
    point(0, root)
    header += struct.pack("<5i", root - vtable, _FORMAT_VERSION, 1, 1, 0)
    point(root + 16, len(header))
    header += struct.pack("<I", len(parameters))
    entries = len(header)
    header += bytes(4 * len(parameters))

    tables = []
    for i, (name, dtype, shape) in enumerate(parameters):
        table = align(4)
        point(entries + 4 * i, table)
        header += struct.pack("<iIIiI", table - vtable, 0, 0, _ONNX_TYPES[dtype], 0)
        point(table + 4, len(header))
        encoded = name.encode()
        header += struct.pack("<I", len(encoded)) + encoded + b"\0"
        point(table + 8, align(8, then=4))
        header += struct.pack(f"<I{len(shape)}q", len(shape), *shape)
        tables.append(table)

    # Each tensor's length is followed by its data, which starts at a multiple of 8.
    end = align(8)
    for table, (_, dtype, shape) in zip(tables, parameters, strict=True):
        nbytes = dtype.itemsize * math.prod(shape)
        if end + 8 + nbytes > _LARGEST:
            raise AdapterError("the adapter is larger than the 2 GiB of an .onnx_adapter file", do="use a smaller rank")
        point(table + 16, end + 4)
        end += 8 + nbytes + -nbytes % 8

    return bytes(header)
