"""Weights that are written at the moment they are used: the reference model multiplies by them while they pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from crayon_export.architecture import linears
from crayon_export.checkpoint import Checkpoint, Fingerprint
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise, Quantized
from crayon_export.report import TensorReport
from crayon_runtime.errors import UnsupportedModel
from crayon_runtime.manifest import Architecture

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_BLOCK_BYTES = 1 << 20  # rows are quantized in pieces that stay in a core's cache: twice as fast as whole chunks
_FLOAT16_MAX = 65504.0


class WrittenWeights:
    """`reference.Weights` over a checkpoint. Each tensor is read once, in chunks, and leaves in the format of the bundle.

    The streams of the reference are the variants (the base, then each adapter) with float weights and, where the format is
    quantized, the same variants again with the dequantized ones.

    Args:
        fingerprint: sees the bytes of every source tensor.
        data: where the tensors go.
        blockwise: the format of the linear layers; None: float32.
        embedding: "fp32" or "fp16".
        adapters: kept beside the weights; each is one variant.
        merged: added into the weights before they are quantized: W + scale B A.
        on_bytes: told the bytes of float32 weight that were handled.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        fingerprint: Fingerprint,
        data: ExternalData,
        *,
        blockwise: Blockwise | None,
        embedding: str,
        adapters: Sequence[PeftAdapter],
        merged: PeftAdapter | None,
        threads: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._a = architecture
        self._fingerprint = fingerprint
        self._data = data
        self._blockwise = blockwise
        self._embedding = embedding
        self._variants: list[PeftAdapter | None] = [None, *adapters]
        self._merged = merged
        self._pool = ThreadPoolExecutor(threads)
        self._on_bytes = on_bytes
        self._linears = {x.module: x for x in linears(architecture)}
        self.reports: list[TensorReport] = []

    @property
    def float_streams(self) -> slice:
        """Which streams of the reference used the float weights."""
        return slice(0, len(self._variants))

    @property
    def written_streams(self) -> slice:
        """Which streams used the weights as the bundle holds them."""
        return slice(len(self._variants) if self._lossy else 0, None)

    @property
    def _lossy(self) -> bool:
        return self._blockwise is not None or self._embedding != "fp32"

    def embed(self, ids: Ids) -> Floats:
        name = "model.embed_tokens.weight"
        a = self._a
        table_type = np.float32 if self._embedding == "fp32" else np.float16
        exact = np.zeros((len(ids), a.hidden_size), np.float32)
        error = _Error()

        def chunks() -> Iterator[npt.NDArray[np.generic]]:
            for start, rows in self._rows(name):
                if table_type is np.float16 and np.abs(rows).max() > _FLOAT16_MAX:
                    raise UnsupportedModel(f"{name} has values beyond float16", do="export with --quantize none")
                here = (ids >= start) & (ids < start + len(rows))
                exact[here] = rows[ids[here] - start]
                stored = rows.astype(table_type)
                error.add(rows, stored.astype(np.float32))
                yield stored

        self._data.add_chunks(name, table_type, (a.vocab_size, a.hidden_size), chunks())
        nbytes = a.vocab_size * a.hidden_size * np.dtype(table_type).itemsize
        self.reports.append(error.report(name, self._embedding, 0, nbytes))
        streams = [exact] * len(self._variants)
        if self._lossy:
            streams += [exact.astype(table_type).astype(np.float32)] * len(self._variants)
        return np.stack(streams)

    def vector(self, name: str) -> Floats:
        whole = np.concatenate([rows for _, rows in self._rows(name)])
        self._data.add(name, whole)
        return whole

    def linear(self, module: str, x: Floats) -> Floats:
        head = module == "lm_head"
        rows = self._a.vocab_size if head else self._linears[module].out_features
        y = np.zeros((*x.shape[:2], rows), np.float32)
        if self._blockwise is None:
            self._write_float(module, rows, x, y)
        else:
            self._write_quantized(module, rows, x, y, self._blockwise)
        for stream in range(len(x)):
            adapter = self._variants[stream % len(self._variants)]
            if adapter is not None and module in adapter.targets:
                update = x[stream] @ adapter.a(module).T @ adapter.b(module).T
                y[stream] += np.float32(adapter.scale(module)) * update
        return y

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _write_float(self, module: str, rows: int, x: Floats, y: Floats) -> None:
        width = x.shape[-1]

        def chunks() -> Iterator[Floats]:
            for start, weights in self._weights(module):
                y[..., start : start + len(weights)] = _product(x, weights)
                yield weights

        self._data.add_chunks(f"{module}.weight", np.float32, (rows, width), chunks())
        self.reports.append(TensorReport(f"{module}.weight", "fp32", 0, 0.0, 0.0, rows * width * 4))

    def _write_quantized(self, module: str, rows: int, x: Floats, y: Floats, blockwise: Blockwise) -> None:
        width, half = x.shape[-1], len(x) // 2
        groups = blockwise.groups(width)
        scales = np.empty((rows, groups), np.float32)
        error = _Error()
        block = max(1, _BLOCK_BYTES // (4 * width))

        def quantize(weights: Floats) -> tuple[Quantized, Floats]:
            q = blockwise.quantize(weights)
            return q, blockwise.dequantize(q, width)

        def chunks() -> Iterator[npt.NDArray[np.uint8]]:
            for start, weights in self._weights(module):
                stop = start + len(weights)
                pieces = list(self._pool.map(quantize, (weights[i : i + block] for i in range(0, len(weights), block))))
                written = np.concatenate([w for _, w in pieces])
                scales[start:stop] = np.concatenate([q.scales for q, _ in pieces])
                y[:half, :, start:stop] = _product(x[:half], weights)
                y[half:, :, start:stop] = _product(x[half:], written)
                error.add(weights, written)
                yield np.concatenate([q.codes for q, _ in pieces])

        codes = (rows, groups, blockwise.group_size * blockwise.bits // 8)
        self._data.add_chunks(f"{module}.weight_codes", np.uint8, codes, chunks())
        self._data.add(f"{module}.weight_scales", scales)
        nbytes = blockwise.nbytes(rows, width)
        self.reports.append(error.report(f"{module}.weight", blockwise.name, blockwise.group_size, nbytes))

    def _weights(self, module: str) -> Iterator[tuple[int, Floats]]:
        """The float weights of a linear layer by rows, with the merged adapter added."""
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


class _Error:
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

    def report(self, name: str, stored_as: str, group_size: int, nbytes: int) -> TensorReport:
        relative = (self.difference / self.squares) ** 0.5 if self.squares else 0.0
        return TensorReport(name, stored_as, group_size, relative, self.largest, nbytes)
