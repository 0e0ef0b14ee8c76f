"""The `.onnx_adapter` file, written as a stream: one tensor in memory at a time, whatever the size of the model.

ONNX Runtime's own writer (`AdapterFormat.export_adapter`) keeps every tensor, a copy of each, and the file. The format is a
FlatBuffer of its `adapter_schema.fbs`:

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8] (force_align: 8); }
    table Adapter   { format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]; }
    root_type Adapter; file_identifier "TORT";

A FlatBuffer's offsets point forward, so all that is small comes first, and the tensors follow in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from crayon_runtime.errors import AdapterError

if TYPE_CHECKING:
    import numpy.typing as npt

IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_FLOAT = 1
# Size of the vtable and of the table, then where each of the four fields is in the table.
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
_LARGEST = (1 << 31) - 1  # bytes that FlatBuffers can address

Tensor = tuple[tuple[int, int], "Callable[[], npt.NDArray[np.float32]]"]
"""The shape of a matrix, and what computes it when its turn comes."""


class _Output(Protocol):
    def write(self, data: bytes, /) -> int: ...


def write_onnx_adapter(file: _Output, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 tensors, by the name of the input that each is bound to.

    Args:
        file: open for sequential binary writing.

    Raises:
        AdapterError: there is more than the format holds (2 GiB).
    """
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
    header += struct.pack("<I", len(tensors))
    entries = len(header)
    header += bytes(4 * len(tensors))

    tables = []
    for i, (name, (shape, _)) in enumerate(tensors.items()):
        table = align(4)
        point(entries + 4 * i, table)
        header += struct.pack("<iIIiI", table - vtable, 0, 0, _FLOAT, 0)
        point(table + 4, len(header))
        encoded = name.encode()
        header += struct.pack("<I", len(encoded)) + encoded + b"\0"
        point(table + 8, align(8, then=4))
        header += struct.pack("<I2q", 2, *shape)
        tables.append(table)

    # Each tensor's length is followed by its data, which starts at a multiple of 8.
    end = align(8)
    for table, (shape, _) in zip(tables, tensors.values(), strict=True):
        nbytes = 4 * shape[0] * shape[1]
        if end + 8 + nbytes > _LARGEST:
            raise AdapterError("the adapter is larger than the 2 GiB of an .onnx_adapter file", do="use a smaller rank")
        point(table + 16, end + 4)
        end += 8 + nbytes + -nbytes % 8

    file.write(bytes(header))
    for name, (shape, compute) in tensors.items():
        array = np.ascontiguousarray(compute(), dtype="<f4")
        if array.shape != shape:
            raise AdapterError(f"{name} has shape {array.shape}, not {shape}")
        file.write(struct.pack("<4xI", array.nbytes))
        file.write(array.tobytes())
        file.write(bytes(-array.nbytes % 8))
