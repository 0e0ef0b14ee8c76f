"""Weights that are written at the moment they are used: the reference model multiplies by them while they pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from crayon_export.architecture import EMBEDDING, linears
from crayon_export.calibration import CalibrationStream
from crayon_export.checkpoint import Checkpoint, Fingerprint
from crayon_export.lora import PeftAdapter
from crayon_export.report import TensorReport
from crayon_export.rounding import Rounding, nearest
from crayon_export.storage import Matrix, Storage, scaled
from crayon_runtime.manifest import Architecture

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class WrittenWeights:
    """`reference.Weights` over a checkpoint. Each tensor is read once, in chunks, and leaves in the format of every backend. Those of a
    block that is repeated stay in memory until its last pass.

    The streams of the reference are the variants (the base, then each adapter) with float weights and, for each storage that is
    lossy, the same variants again with the weights as that one holds them. Calibration texts go through beside them, each as the base
    of a lossy storage computes them.

    Args:
        fingerprint: sees the bytes of every source tensor.
        storages: one for each backend.
        adapters: kept beside the weights; each is one variant.
        merged: added into the weights before they are quantized: W + scale B A.
        rounding: of the linear layers.
        calibration: token ids, int64 [T_i] each; where there are some, linear layers are rounded by GPTQ.
        on_bytes: told the bytes of float32 weight that were handled.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        fingerprint: Fingerprint,
        storages: Sequence[Storage],
        *,
        adapters: Sequence[PeftAdapter],
        merged: PeftAdapter | None,
        rounding: Rounding = nearest,
        calibration: Sequence[Ids] = (),
        on_bytes: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._a = architecture
        self._fingerprint = fingerprint
        self._storages = storages
        self._lossy = [storage for storage in storages if storage.lossy]
        self._variants: list[PeftAdapter | None] = [None, *adapters]
        self._merged = merged
        self._rounding = rounding
        self._calibration = calibration
        self._calibrated: dict[Storage, CalibrationStream] = {}
        """Of each lossy storage, where there are calibration texts."""
        self._on_bytes = on_bytes
        self._linears = {x.module: x for x in linears(architecture)}
        self._vectors: dict[str, Floats] = {}
        self._block: dict[str, list[tuple[int, list[Floats]]]] = {}
        """What `_pushed` returned for each chunk of the linear layers of one block, by module."""
        self._ahead: dict[str, list[tuple[int, Floats]]] = {}
        """The float weights of a block that were read before their turn."""
        self.reports: list[TensorReport] = []

    def streams(self, storage: Storage | None = None) -> slice:
        """Which streams of the reference used the weights as a storage holds them; None: the float weights."""
        family = 0 if storage not in self._lossy else 1 + self._lossy.index(storage)
        return slice(family * len(self._variants), (family + 1) * len(self._variants))

    def embed(self, ids: Ids) -> Floats:
        a = self._a
        golden = len(ids)
        ids = np.concatenate([ids, *self._calibration])
        families = np.zeros((1 + len(self._lossy), len(ids), a.hidden_size), np.float32)
        matrices = [storage.embedding(EMBEDDING, a.vocab_size, a.hidden_size) for storage in self._storages]
        for start, rows in self._rows(EMBEDDING):
            here = (ids >= start) & (ids < start + len(rows))
            for family, worth in enumerate(self._pushed(rows, matrices)):
                families[family, here] = worth[ids[here] - start]
        self.reports += [matrix.close() for matrix in matrices]
        if self._calibration:
            self._calibrated = {
                storage: CalibrationStream(a, self.vector, self._calibration, x[golden:].copy())
                for storage, x in zip(self._lossy, families[1:], strict=True)
            }
        return np.repeat(families[:, :golden], len(self._variants), axis=0)

    def vector(self, name: str) -> Floats:
        if name in self._vectors:
            return self._vectors[name]
        whole = self._vectors[name] = np.concatenate([rows for _, rows in self._rows(name)])
        for storage in self._storages:
            storage.vector(name, whole)
        return whole

    def linear(self, module: str, x: Floats) -> Floats:
        rows = self._a.vocab_size if module == "lm_head" else self._linears[module].out_features
        families = [slice(i, i + len(self._variants)) for i in range(0, len(x), len(self._variants))]
        y = np.zeros((*x.shape[:2], rows), np.float32)
        for start, chunk in self._chunks(module, rows, x.shape[-1]):
            for family, worth in zip(families, chunk, strict=True):
                y[family, :, start : start + len(worth)] = _product(x[family], worth)
            for texts, worth in zip(self._calibrated.values(), chunk[1:], strict=False):
                texts.multiply(worth)
        for texts in self._calibrated.values():
            texts.advance()
        for variant, adapter in enumerate(self._variants):
            if adapter is not None and module in adapter.targets:
                pairs = [scaled(adapter, module), *(storage.adapter(adapter, module) for storage in self._lossy)]
                for family, (a, b) in zip(families, pairs, strict=True):
                    stream = family.start + variant
                    y[stream] += x[stream] @ a.T @ b.T
        return y

    def _chunks(self, module: str, rows: int, width: int) -> Iterator[tuple[int, list[Floats]]]:
        """A linear layer by rows, as `_pushed` returns them; it is stored in the first pass."""
        if module in self._block:
            yield from self._block[module]
            return
        linear = self._linears.get(module)
        repeated = linear is not None and self._a.layer_repeats > 1
        if linear is None or any(self._linears[kept].layer != linear.layer for kept in self._block):
            self._block.clear()
        if repeated and self._calibrated and not self._block:
            self._rehearse(self._linears[module].layer)
        matrices = [
            storage.linear(module, rows, width, self._calibrated.get(storage, self._rounding))
            for storage in self._storages
        ]
        kept = []
        for start, weights in self._weights(module):
            chunk = self._pushed(weights, matrices)
            yield start, chunk
            if repeated:
                kept.append((start, chunk))
        for storage, matrix in zip(self._storages, matrices, strict=True):
            report = matrix.close()
            self.reports.append(self._calibrated[storage].complete(report) if storage in self._calibrated else report)
        if repeated:
            self._block[module] = kept

    def _rehearse(self, layer: int) -> None:
        """Read a block that is repeated, and show the calibration texts what its later passes will be like."""
        modules = [module for module, linear in self._linears.items() if linear.layer == layer]
        self._ahead = {module: list(self._weights(module)) for module in modules}
        whole = {module: np.concatenate([rows for _, rows in chunks]) for module, chunks in self._ahead.items()}
        for texts in self._calibrated.values():
            texts.rehearse(layer, whole)

    def _pushed(self, rows: Floats, matrices: Sequence[Matrix]) -> list[Floats]:
        """Rows, stored everywhere: themselves, and what each lossy storage makes of them."""
        worth = [matrix.add(rows) for matrix in matrices]
        return [rows, *(w for w, storage in zip(worth, self._storages, strict=True) if storage.lossy)]

    def _weights(self, module: str) -> Iterator[tuple[int, Floats]]:
        """The float weights of a linear layer by rows, with the merged adapter added."""
        if module in self._ahead:
            yield from self._ahead.pop(module)
            return
        tied = module == "lm_head" and self._a.tied_embeddings
        name = "model.embed_tokens.weight" if tied else f"{module}.weight"
        merged = self._merged if self._merged is not None and module in self._merged.targets else None
        if merged is None:
            yield from self._rows(name, again=tied)
            return
        a, b = merged.a(module), merged.b(module) * np.float32(merged.scale(module))
        for start, rows in self._rows(name):
            rows += b[start : start + len(rows)] @ a
            yield start, rows

    def _rows(self, name: str, *, again: bool = False) -> Iterator[tuple[int, Floats]]:
        for start, rows in self._checkpoint.stream(name, fingerprint=None if again else self._fingerprint):
            yield start, rows
            self._on_bytes(rows.nbytes)


def _product(x: Floats, weights: Floats) -> Floats:
    """x W^T as one matrix product over all streams."""
    return np.asarray((x.reshape(-1, x.shape[-1]) @ weights.T).reshape(*x.shape[:-1], -1))
