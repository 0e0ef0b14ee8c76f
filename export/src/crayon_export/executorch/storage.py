"""The weights in the formats that XNNPACK computes with, kept in files until a program is made of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crayon_export.lora import PeftAdapter
from crayon_export.quantize import Blockwise
from crayon_export.report import TensorReport
from crayon_export.rounding import Rounding, nearest
from crayon_export.storage import Error, Matrix, in_pieces, scaled
from crayon_runtime.affine import Affine, Codes

Floats = npt.NDArray[np.float32]

GROUP_SIZES = (128, 64, 32)
PER_ROW = Affine(8, 0)


def weights_form(blockwise: Blockwise | None) -> Affine | None:
    """What XNNPACK has for a format of linear layers: int4 in the same groups, int8 by row; None: float32."""
    if blockwise is None:
        return None
    return PER_ROW if blockwise.bits == 8 else Affine(4, blockwise.group_size)


class Stored(NamedTuple):
    """A tensor as the program will hold it."""

    values: Codes | Floats
    """int8 codes [out, in], or float32."""
    scales: Floats | None
    """float32 [out, groups], not yet rounded; None: the values are float32."""
    form: Affine | None


def linear_form(width: int, weights: Affine | None, *, tied_head: bool = False) -> Affine | None:
    """The format of a linear layer of this width: int8 by row, or groups of the size that was asked for, or of the next smaller one that
    divides it.

    None: float32, because it was asked for, or because no group divides the width. The official exporter leaves in float every layer
    that the size asked for does not divide, and does not say so.

    Args:
        weights: what was asked for, see `weights_form`.
        tied_head: it is the embedding: int8 by row, the same bytes, which a data file holds once.
    """
    if weights is None:
        return None
    if tied_head or weights == PER_ROW:
        return PER_ROW
    sizes = [size for size in GROUP_SIZES if size <= weights.group_size and width % size == 0]
    return Affine(4, sizes[0]) if sizes else None


class ProgramStorage:
    """`storage.Storage` in a scratch folder, one file a matrix.

    Linear layers are int4 in groups or int8 by row, with activations quantized to int8 while they run ("8da4w", "8da8w"), the embedding
    is int8 by row, the A and B of adapters int8 by output channel.

    Args:
        weights: the format of linear layers, see `weights_form`; None: everything is float32.
        tied: whether the output layer is the embedding.
        pool: quantizes.
    """

    backend = "executorch"

    def __init__(self, folder: Path, *, weights: Affine | None, tied: bool, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._weights = weights
        self._tied = tied
        self._pool = pool
        self.tensors: dict[str, Stored] = {}
        """By the name in the checkpoint; an untied and a tied head alike as lm_head.weight."""

    @property
    def lossy(self) -> bool:
        return self._weights is not None

    def embedding(self, name: str, rows: int, width: int) -> Matrix:
        return _File(self, name, rows, width, PER_ROW if self.lossy else None, nearest)

    def linear(self, module: str, rows: int, width: int, rounding: Rounding) -> Matrix:
        tied = self._tied and module == "lm_head"
        form = linear_form(width, self._weights, tied_head=tied)
        return _File(self, f"{module}.weight", rows, width, form, nearest if tied else rounding)

    def vector(self, name: str, values: Floats) -> None:
        self.tensors[name] = Stored(values, None, None)

    def adapter(self, adapter: PeftAdapter, module: str) -> tuple[Floats, Floats]:
        a, b = (worth(stored) for stored in self.stored_adapter(adapter, module))
        return a, b

    def stored_adapter(self, adapter: PeftAdapter, module: str) -> tuple[Stored, Stored]:
        return stored_adapter(adapter, module, quantize=self.lossy)

    def create(self, name: str, rows: int, width: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        path = self._folder / f"{len(self.tensors)}-{name}"
        return np.memmap(path, dtype, "w+", shape=(rows, width))

    def in_pieces(self, rows: Floats, form: Affine, rounding: Rounding) -> list[tuple[Codes, Floats]]:
        return in_pieces(self._pool, form.quantize, *rounding(form, rows))


class _File:
    def __init__(
        self, storage: ProgramStorage, name: str, rows: int, width: int, form: Affine | None, rounding: Rounding
    ) -> None:
        self._storage, self._name, self._form, self._rounding = storage, name, form, rounding
        self._values = storage.create(name, rows, width, np.float32 if form is None else np.int8)
        self._scales: list[Floats] = []
        self._done = 0
        self._error = Error()

    def add(self, rows: Floats) -> Floats:
        here = slice(self._done, self._done + len(rows))
        self._done += len(rows)
        if self._form is None:
            self._values[here] = rows
            return rows
        pieces = self._storage.in_pieces(rows, self._form, self._rounding)
        self._values[here] = np.concatenate([codes for codes, _ in pieces])
        self._scales += [scales for _, scales in pieces]
        worth = np.concatenate([self._form.dequantize(*piece) for piece in pieces])
        self._error.add(rows, worth)
        return worth

    def close(self) -> TensorReport:
        form, (rows, width) = self._form, self._values.shape
        scales = None if form is None else np.concatenate(self._scales)
        self._storage.tensors[self._name] = Stored(self._values, scales, form)  # type: ignore[arg-type]
        stored_as = form.name if form else "fp32"
        group_size, nbytes = (form.group_size, form.nbytes(rows, width)) if form else (0, 4 * rows * width)
        return self._error.report("executorch", self._name, stored_as, group_size, nbytes)


def stored_adapter(adapter: PeftAdapter, module: str, *, quantize: bool) -> tuple[Stored, Stored]:
    """A [r, in] and B [out, r], the factor alpha/r included, as the program will hold them."""
    a, b = (
        Stored(*PER_ROW.quantize(m), PER_ROW) if quantize else Stored(m, None, None) for m in scaled(adapter, module)
    )
    return a, b


def worth(stored: Stored) -> Floats:
    """What a program computes with, float32."""
    values, scales, form = stored
    return np.asarray(values, np.float32) if form is None or scales is None else form.dequantize(values, scales)  # type: ignore[arg-type]
