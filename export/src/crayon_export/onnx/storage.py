"""The weights in the format of the ONNX graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from crayon_export.lora import PeftAdapter
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise, Quantized
from crayon_export.report import TensorReport
from crayon_export.rounding import Rounding
from crayon_export.storage import Error, Matrix, in_pieces, scaled
from crayon_runtime.errors import UnsupportedModel

Floats = npt.NDArray[np.float32]

_FLOAT16_MAX = 65504.0


class OnnxStorage:
    """`storage.Storage` in an ONNX external-data file.

    Args:
        blockwise: the format of the linear layers; None: float32.
        embedding: "fp32" or "fp16".
        pool: quantizes.
    """

    backend = "onnx"

    def __init__(
        self, data: ExternalData, *, blockwise: Blockwise | None, embedding: str, pool: ThreadPoolExecutor
    ) -> None:
        self._data = data
        self._blockwise = blockwise
        self._embedding = embedding
        self._pool = pool

    @property
    def lossy(self) -> bool:
        return self._blockwise is not None or self._embedding != "fp32"

    def embedding(self, name: str, rows: int, width: int) -> Matrix:
        return _Plain(self._data, name, rows, width, self._embedding)

    def linear(self, module: str, rows: int, width: int, rounding: Rounding) -> Matrix:
        if self._blockwise is None:
            return _Plain(self._data, f"{module}.weight", rows, width, "fp32")
        return _Quantized(self._data, f"{module}.weight", rows, width, self._blockwise, rounding, self._pool)

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
        self._data, self._name, self._width = data, name, width
        self._blockwise, self._rounding, self._pool = blockwise, rounding, pool
        self._nbytes = blockwise.nbytes(rows, width)
        codes = (rows, blockwise.groups(width), blockwise.group_size * blockwise.bits // 8)
        self._codes = data.open(f"{name}_codes", np.uint8, codes)
        self._scales: list[Floats] = []
        self._error = Error()

    def add(self, rows: Floats) -> Floats:
        pieces = in_pieces(self._pool, self._quantize, *self._rounding(self._blockwise, rows))
        self._codes.write(np.concatenate([q.codes for q, _ in pieces]))
        self._scales += [q.scales for q, _ in pieces]
        worth = np.concatenate([w for _, w in pieces])
        self._error.add(rows, worth)
        return worth

    def close(self) -> TensorReport:
        self._codes.close()
        self._data.add(f"{self._name}_scales", np.concatenate(self._scales))
        return self._error.report("onnx", self._name, self._blockwise.name, self._blockwise.group_size, self._nbytes)

    def _quantize(self, rows: Floats, scales: Floats | None) -> tuple[Quantized, Floats]:
        q = self._blockwise.quantize(rows, scales)
        return q, self._blockwise.dequantize(q, self._width)
