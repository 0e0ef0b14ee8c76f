"""How a backend's files hold the weights: what the exporter hands each backend, and what it wants back.

`WrittenWeights` reads a checkpoint once and pushes every tensor into each storage; what a storage says its rows are worth is what the
golden cases of that backend are computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from crayon_export.lora import PeftAdapter
from crayon_export.report import TensorReport

if TYPE_CHECKING:
    from crayon_export.rounding import Rounding

Floats = npt.NDArray[np.float32]
_Piece = TypeVar("_Piece")

_BLOCK_BYTES = 1 << 20  # rows are quantized in pieces that stay in a core's cache: twice as fast as whole chunks


class Matrix(Protocol):
    """A matrix on its way into a file."""

    def add(self, rows: Floats) -> Floats:
        """Store the next rows, float32 [n, in]. Returns what the backend will compute with in their place."""

    def close(self) -> TensorReport:
        """All rows were added."""


class Storage(Protocol):
    """The weights in the format of one backend. Tensors come one after the other, in the order of computation."""

    @property
    def backend(self) -> str: ...

    @property
    def lossy(self) -> bool:
        """Whether it computes with anything else than the float32 weights."""

    def embedding(self, name: str, rows: int, width: int) -> Matrix: ...

    def linear(self, module: str, rows: int, width: int, rounding: Rounding) -> Matrix:
        """A linear layer, which finds its codes with this rounding where it is quantized and not shared with the embedding."""

    def vector(self, name: str, values: Floats) -> None:
        """The weight of a norm, float32 [hidden]."""

    def adapter(self, adapter: PeftAdapter, module: str) -> tuple[Floats, Floats]:
        """A [r, in] and B [out, r], the factor alpha/r included, as the backend computes with them."""


def in_pieces(
    pool: ThreadPoolExecutor,
    function: Callable[[Floats, Floats | None], _Piece],
    rows: Floats,
    scales: Floats | None = None,
) -> list[_Piece]:
    """A function applied to pieces of consecutive rows, with the scales of each if there are any, on all cores, in order."""
    block = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    pieces = [slice(i, i + block) for i in range(0, len(rows), block)]
    return list(pool.map(lambda piece: function(rows[piece], None if scales is None else scales[piece]), pieces))


def scaled(adapter: PeftAdapter, module: str) -> tuple[Floats, Floats]:
    """A [r, in] and B [out, r] with the factor alpha/r."""
    return adapter.a(module), adapter.b(module) * np.float32(adapter.scale(module))


class Error:
    """How far stored weights are from the source, over the chunks of a tensor."""

    def __init__(self) -> None:
        self.squares = self.difference = 0.0
        self.largest = 0.0

    def add(self, source: Floats, stored: Floats) -> None:
        flat = source.reshape(-1)
        d = flat - stored.reshape(-1)
        self.squares += float(flat @ flat)
        self.difference += float(d @ d)
        self.largest = max(self.largest, float(d.max()), -float(d.min()))

    def report(self, backend: str, name: str, stored_as: str, group_size: int, nbytes: int) -> TensorReport:
        relative = (self.difference / self.squares) ** 0.5 if self.squares else 0.0
        return TensorReport(backend, name, stored_as, group_size, relative, self.largest, nbytes)
