"""Symmetric quantization of weight matrices as torchao and XNNPACK have it: by groups of columns, or by whole rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]


_NARROW = 32
"""Up to this width, groups are compared column by column, which is faster by a half to four times."""


class Affine(NamedTuple):
    """The rule of torchao's symmetric `Int8DynamicActivationIntxWeightConfig` and `IntxWeightOnlyConfig` ("affine"):

        scale = max(absmax / ((2^bits - 1) / 2), 2^-126)
        code  = clip(round(w * (1 / scale)), -2^(bits-1), 2^(bits-1) - 1)      halves to even
        w'    = code * scale

    equal to torchao's byte for byte. XNNPACK keeps the scales of groups as bfloat16, so the codes are made with the float32 scale and
    stand for multiples of the rounded one; those of whole rows stay float32.
    """

    bits: int
    group_size: int
    """0: a whole row."""

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a quantized [rows, width] matrix, scales included."""
        scales = 2 * width // self.group_size if self.group_size else 4
        return rows * (width * self.bits // 8 + scales)

    def grouped(self, weights: Floats) -> Floats:
        """float32 [n, in] as [n, groups, size]; the groups divide `in`."""
        n, width = weights.shape
        return weights.reshape(n, -1, self.group_size or width)

    def scales(self, groups: Floats) -> Floats:
        """The scales of float32 [..., size] groups, float32 [...], not yet rounded."""
        magnitudes, size = np.abs(groups), groups.shape[-1]
        if size <= _NARROW:
            largest = np.ascontiguousarray(magnitudes.reshape(-1, size).T).max(axis=0).reshape(groups.shape[:-1])
        else:
            largest = magnitudes.max(axis=-1)
        scales = largest / np.float32(((1 << self.bits) - 1) / 2)
        return np.asarray(np.maximum(scales, np.finfo(np.float32).smallest_normal), np.float32)

    def stored(self, scales: Floats) -> Floats:
        """Scales as XNNPACK keeps them."""
        return bfloat16(scales) if self.group_size else scales

    def quantize(self, weights: Floats, scales: Floats | None = None) -> tuple[Codes, Floats]:
        """Codes int8 [n, in] and scales float32 [n, groups], not yet rounded, of float32 [n, in] rows.

        Args:
            scales: to use, float32 [n, groups]; None: those of `scales`.
        """
        groups = self.grouped(weights)
        scales = self.scales(groups) if scales is None else scales
        return self._codes(groups, scales[..., None]).astype(np.int8).reshape(weights.shape), scales

    def fake_quantize(self, weights: Floats, scales: Floats) -> Floats:
        """What `dequantize` makes of weights of any shape, quantized with these scales, which are broadcast."""
        values = self._codes(weights, scales)
        values *= self.stored(scales)
        return values

    def dequantize(self, codes: Codes, scales: Floats) -> Floats:
        """The float32 [n, in] rows that the codes stand for."""
        n, width = codes.shape
        values = codes.reshape(n, -1, self.group_size or width) * self.stored(scales)[..., None]
        return np.asarray(values, np.float32).reshape(n, width)

    def _codes(self, weights: Floats, scales: Floats) -> Floats:
        codes = np.rint(weights * (np.float32(1) / scales))
        half = 1 << (self.bits - 1)
        return np.clip(codes, -half, half - 1, out=codes)


def bfloat16(x: Floats) -> Floats:
    """The nearest values that bfloat16 holds, halves to even, as float32; `x` is finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
