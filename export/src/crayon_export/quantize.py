"""Group-wise symmetric quantization of weight matrices for ONNX Runtime's MatMulNBits; ExecuTorch's is `crayon_runtime.affine`.

A row of a weight matrix [out, in] is cut into groups of `group_size` input columns. Each group has one float32 scale,

    scale = m / -2^(bits-1),   m = the element of the group with the largest magnitude, with its sign
    code  = clip(round(w * (1 / scale) + 2^(bits-1)), 0, 2^bits - 1)      halves up
    w'    = (code - 2^(bits-1)) * scale

so that m itself is represented exactly and one more level is used than with absmax / (2^(bits-1) - 1). The same rule as
`quantize_matmul_4bits` of ONNX Runtime and Q4_0 of llama.cpp, and equal to the former byte for byte. A last group that the width
does not fill is padded with zeros.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from crayon_runtime.errors import InvalidInput

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

GROUP_SIZES = (16, 32, 64, 128, 256)

DEFAULT_GROUP_SIZE = 32
"""Our choice: the table of `make bench` shows what larger groups cost on real weights, and what they gain in speed."""

BITS = {"int4": 4, "int8": 8}
"""The formats by the names that users give them; "none" is float32."""


class Quantized(NamedTuple):
    """Some rows of a quantized matrix."""

    codes: Bytes
    """uint8 [n, groups, group_size * bits / 8]: two 4-bit codes a byte, the lower half first; or one 8-bit code."""
    scales: Floats
    """float32 [n, groups]"""


class Blockwise(NamedTuple):
    """A format: how many bits a weight has, and how many weights share a scale."""

    bits: int
    group_size: int

    @classmethod
    def named(cls, quantize: str, group_size: int | None) -> Blockwise | None:
        """The format that a user asks for; None: float32.

        Args:
            quantize: "int4", "int8" or "none".
            group_size: one of `GROUP_SIZES`; None: `DEFAULT_GROUP_SIZE`.

        Raises:
            InvalidInput: there is no such format.
        """
        if quantize not in (*BITS, "none"):
            raise InvalidInput(f"quantize is {quantize!r}, not {', '.join(BITS)} or none")
        group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
        if group_size not in GROUP_SIZES:
            raise InvalidInput(f"the group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        return None if quantize == "none" else cls(BITS[quantize], group_size)

    def shared(self, width: int) -> Blockwise | None:
        """The format of an embedding that is the output layer, too: int8, in the largest groups up to these that divide the width.

        ONNX Runtime looks rows up in whole groups only. None: no group divides the width.
        """
        sizes = [size for size in GROUP_SIZES if size <= self.group_size and width % size == 0]
        return Blockwise(8, sizes[-1]) if sizes else None

    @property
    def name(self) -> Literal["int4", "int8"]:
        return "int4" if self.bits == 4 else "int8"

    def groups(self, width: int) -> int:
        return -(-width // self.group_size)

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a quantized [rows, width] matrix, scales included."""
        return rows * self.groups(width) * (self.group_size * self.bits // 8 + 4)

    def grouped(self, weights: Floats) -> Floats:
        """float32 [n, in] as [n, groups, group_size], padded with zeros."""
        n, width = weights.shape
        groups = self.groups(width)
        if width % self.group_size:
            weights = np.pad(weights, ((0, 0), (0, groups * self.group_size - width)))
        return weights.reshape(n, groups, self.group_size)

    def scales(self, groups: Floats) -> Floats:
        """The scales of groups, float32 [...], that represent the largest weight exactly: of float32 [..., n], any n."""
        largest, smallest = groups.max(axis=-1), groups.min(axis=-1)
        return np.asarray(np.where(largest > -smallest, largest, smallest) / -self._half)

    def stored(self, scales: Floats) -> Floats:
        """Scales as the file holds them: as they are."""
        return scales

    def quantize(self, weights: Floats, scales: Floats | None = None) -> Quantized:
        """Quantize float32 [n, in] rows with these scales, float32 [n, groups]; None: those of `scales`."""
        groups = self.grouped(weights)
        scales = self.scales(groups) if scales is None else scales
        packed = self._shifted(groups, scales[..., None]).astype(np.uint8)  # truncates: halves were rounded up
        if self.bits == 4:
            packed = packed[..., ::2] | packed[..., 1::2] << np.uint8(4)
        return Quantized(packed, scales)

    def fake_quantize(self, weights: Floats, scales: Floats) -> Floats:
        """What `dequantize` makes of weights of any shape, quantized with these scales, which are broadcast."""
        values = self._shifted(weights, scales)
        np.floor(values, out=values)
        values -= self._half
        values *= scales
        return values

    def dequantize(self, q: Quantized, width: int) -> Floats:
        """The float32 [n, width] rows that the codes stand for."""
        codes = q.codes
        if self.bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
        values = codes.astype(np.float32)
        values -= 1 << (self.bits - 1)
        values *= q.scales[..., None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, :width])

    @property
    def _half(self) -> np.float32:
        return np.float32(1 << (self.bits - 1))

    def _shifted(self, weights: Floats, scales: Floats) -> Floats:
        """The codes, plus what is cut off when they become whole numbers."""
        reciprocal = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        codes = weights * reciprocal
        codes += self._half
        codes += np.float32(0.5)
        return np.clip(codes, 0, 2 * self._half - 1, out=codes)
