"""The weights in the format of the ONNX graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from crayon_export.lora import PeftAdapter
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise, Quantized
from crayon_export.report import TensorReport
from crayon_export.rounding import Rounding, nearest
from crayon_export.storage import Error, Matrix, in_pieces, scaled
from crayon_runtime.errors import UnsupportedModel

Floats = npt.NDArray[np.float32]

_FLOAT16_MAX = 65504.0


class OnnxStorage:
    """`storage.Storage` in an ONNX external-data file.

    Args:
        blockwise: the format of the linear layers; None: float32.
        embedding: "fp32" or "fp16"; "int8": it is the output layer, too, and both read the same bytes.
        tied: whether the output layer is the embedding.
        pool: quantizes.
    """

    backend = "onnx"

    def __init__(
        self, data: ExternalData, *, blockwise: Blockwise | None, embedding: str, tied: bool, pool: ThreadPoolExecutor
    ) -> None:
        self._data = data
        self._blockwise = blockwise
        self._embedding = embedding
        self._tied = tied
        self._pool = pool

    @property
    def lossy(self) -> bool:
        return self._blockwise is not None or self._embedding != "fp32"

    def embedding(self, name: str, rows: int, width: int) -> Matrix:
        form = self._shared(width)
        if form is None:
            return _Plain(self._data, name, rows, width, self._embedding)
        return _Quantized(self._data, name, rows, width, form, nearest, self._pool)

    def linear(self, module: str, rows: int, width: int, rounding: Rounding) -> Matrix:
        if module == "lm_head" and self._tied and self._embedding != "fp16":
            return _Again(f"{module}.weight", self._shared(width), self._pool)
        if self._blockwise is None:
            return _Plain(self._data, f"{module}.weight", rows, width, "fp32")
        return _Quantized(self._data, f"{module}.weight", rows, width, self._blockwise, rounding, self._pool)

    def _shared(self, width: int) -> Blockwise | None:
        return self._blockwise.shared(width) if self._blockwise and self._embedding == "int8" else None

    def vector(self, name: str, values: Floats) -> None:
        self._data.add(name, values)

    def adapter(self, adapter: PeftAdapter, module: str) -> tuple[Floats, Floats]:
        return scaled(adapter, module)


class _Plain:
    """float32 or float16."""

    def __init__(self, data: ExternalData, name: str, rows: int, width: int, stored_as: str) -> None:
        self._name, self._stored_as = name, stored_as
        self._dtype = np.dtype(np.float16 if stored_as == "fp16" else np.float32)
        self._nbytes = rows * width * self._dtype.itemsize
        self._tensor = data.open(name, self._dtype, (rows, width))
        self._error = Error()

    def add(self, rows: Floats) -> Floats:
        if self._dtype == np.float32:
            self._tensor.write(rows)
            return rows
        if np.abs(rows).max() > _FLOAT16_MAX:
            raise UnsupportedModel(f"{self._name} has values beyond float16", do="export with --quantize none")
        stored = rows.astype(np.float16)
        self._tensor.write(stored)
        worth = stored.astype(np.float32)
        self._error.add(rows, worth)
        return worth

    def close(self) -> TensorReport:
        self._tensor.close()
        return self._error.report("onnx", self._name, self._stored_as, 0, self._nbytes)


class _Quantized:
    """Codes, then the scales of all rows."""

    def __init__(
        self,
        data: ExternalData,
        name: str,
        rows: int,
        width: int,
        blockwise: Blockwise,
        rounding: Rounding,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._data, self._name = data, name
        self._blockwise, self._rounding, self._pool = blockwise, rounding, pool
        self._nbytes = blockwise.nbytes(rows, width)
        codes = (rows, blockwise.groups(width), blockwise.group_size * blockwise.bits // 8)
        self._codes = data.open(f"{name}_codes", np.uint8, codes)
        self._scales: list[Floats] = []
        self._error = Error()

    def add(self, rows: Floats) -> Floats:
        pieces = _quantized(rows, self._blockwise, self._rounding, self._pool)
        self._codes.write(np.concatenate([q.codes for q, _ in pieces]))
        self._scales += [q.scales for q, _ in pieces]
        worth = np.concatenate([w for _, w in pieces])
        self._error.add(rows, worth)
        return worth

    def close(self) -> TensorReport:
        self._codes.close()
        self._data.add(f"{self._name}_scales", np.concatenate(self._scales))
        return self._error.report("onnx", self._name, self._blockwise.name, self._blockwise.group_size, self._nbytes)


class _Again:
    """What is stored already: the embedding, as the output layer.

    Args:
        blockwise: its format; None: float32.
    """

    def __init__(self, name: str, blockwise: Blockwise | None, pool: ThreadPoolExecutor) -> None:
        self._name, self._blockwise, self._pool = name, blockwise, pool
        self._error = Error()

    def add(self, rows: Floats) -> Floats:
        if self._blockwise is None:
            return rows
        worth = np.concatenate([w for _, w in _quantized(rows, self._blockwise, nearest, self._pool)])
        self._error.add(rows, worth)
        return worth

    def close(self) -> TensorReport:
        name, size = (self._blockwise.name, self._blockwise.group_size) if self._blockwise else ("fp32", 0)
        return self._error.report("onnx", self._name, name, size, 0)


def _quantized(
    rows: Floats, blockwise: Blockwise, rounding: Rounding, pool: ThreadPoolExecutor
) -> list[tuple[Quantized, Floats]]:
    """Pieces of consecutive rows: as they are stored, and what that is worth."""

    def one(piece: Floats, scales: Floats | None) -> tuple[Quantized, Floats]:
        q = blockwise.quantize(piece, scales)
        return q, blockwise.dequantize(q, piece.shape[1])

    return in_pieces(pool, one, *rounding(blockwise, rows))
