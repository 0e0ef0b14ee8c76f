"""Weights on their way into an ONNX external-data file, one chunk at a time."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

_TYPES = {
    np.dtype(np.float32): onnx.TensorProto.FLOAT,
    np.dtype(np.float16): onnx.TensorProto.FLOAT16,
    np.dtype(np.uint8): onnx.TensorProto.UINT8,
}
_PAGE = 4096
_ALIGNMENT = 64


class _Output(Protocol):
    def write(self, data: bytes | memoryview, /) -> int: ...
    def tell(self) -> int: ...


class ExternalData:
    """The data file of a model: tensors are appended as they come, and each leaves an initializer that points to it.

    Args:
        file: open for sequential binary writing.
        location: the name that the model file calls it by.
    """

    def __init__(self, file: _Output, location: str) -> None:
        self._file = file
        self._location = location
        self.initializers: list[onnx.TensorProto] = []

    def add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        tensor = self.open(name, array.dtype, array.shape)
        tensor.write(array)
        tensor.close()

    def view(self, name: str, of: str, shape: tuple[int, ...]) -> None:
        """A further name for the bytes of a tensor, in another shape."""
        (source,) = (tensor for tensor in self.initializers if tensor.name == of)
        tensor = onnx.TensorProto()
        tensor.CopyFrom(source)
        tensor.name, tensor.dims[:] = name, shape
        self.initializers.append(tensor)

    def open(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> OpenTensor:
        """Begin to append a tensor; the next one begins when this one is closed."""
        nbytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        # Large tensors start on a page, so that a loader can map them.
        self._file.write(bytes(-self._file.tell() % (_PAGE if nbytes >= _PAGE else _ALIGNMENT)))
        tensor = onnx.TensorProto(name=name, data_type=_TYPES[np.dtype(dtype)], dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._file.tell()), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return OpenTensor(self._file, name, np.dtype(dtype), self._file.tell() + nbytes)


class OpenTensor:
    """A tensor whose bytes are being appended."""

    def __init__(self, file: _Output, name: str, dtype: np.dtype[Any], end: int) -> None:
        self._file, self._name, self._dtype, self._end = file, name, dtype, end

    def write(self, chunk: npt.NDArray[np.generic]) -> None:
        self._file.write(_bytes(chunk, self._dtype))

    def close(self) -> None:
        assert self._file.tell() == self._end, f"{self._name}: {self._end - self._file.tell()} bytes are missing"


def _bytes(chunk: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> memoryview:
    array: npt.NDArray[Any] = np.ascontiguousarray(chunk, dtype=dtype)
    if sys.byteorder == "big":  # ONNX data is little-endian
        array = array.byteswap()
    return array.reshape(-1).data.cast("B")
