"""The scores after every token of a run, and not after the last alone: what scoring a text at one go takes.

A bundle's ONNX graph takes the last position of a run before its output layer (the node `model.norm/last`). Here that node is a slice
that begins at a position of our choice; nodes, weights and caches are the bundle's own otherwise. A program of ExecuTorch is compiled
for the last position, so there each token that is scored is a step.

Several sequences in one run are of no use here: ONNX Runtime's GroupQueryAttention takes a batch only without a past ("batch_size must
be 1 when sequence_length > 1 and past context is given"), and programs of ExecuTorch have no such axis. What the choices of a question
have in common is a past.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.backends.onnx import OnnxBackend, OnnxCache
from crayon_runtime.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter, Cache, Ids

    Floats = npt.NDArray[np.float32]

_LAST, _FIRST_ROW = "model.norm/last", "first_row"


def rows(cache: Cache, ids: Ids, first: int) -> Floats:
    """Append tokens to a cache, and return the scores after each of them from `first` on.

    Args:
        ids: int64 [S], S >= 1.
        first: 0 <= first < S.

    Returns:
        float32 [S - first, V]: logits.
    """
    if isinstance(cache, RowsCache):
        return cache.rows(ids, first)
    found = [cache.prefill(ids[: first + 1]).logits.copy()]
    found += [cache.decode(int(token)).logits.copy() for token in ids[first + 1 :]]
    return np.stack(found)


class RowsBackend(OnnxBackend):
    """A model bundle in ONNX Runtime, whose caches also give the scores after every token."""

    @staticmethod
    def graph(model: Path) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        loaded = onnx.load(str(model), load_external_data=False)
        graph = loaded.graph
        at = next((i for i, node in enumerate(graph.node) if node.name == _LAST and node.op_type == "Gather"), None)
        if at is None:
            raise BackendError(
                f"the graph has no node {_LAST!r} that takes the last position",
                where=model,
                do="export the model again with this version",
            )
        last = graph.node[at]
        constants = {"rows.end": np.iinfo(np.int64).max, "rows.axis": 1}
        graph.initializer.extend(numpy_helper.from_array(np.array([v], np.int64), k) for k, v in constants.items())
        graph.input.append(helper.make_tensor_value_info(_FIRST_ROW, TensorProto.INT64, [1]))
        last.CopyFrom(
            helper.make_node("Slice", [last.input[0], _FIRST_ROW, *constants], list(last.output), name=last.name)
        )
        logits = next(output for output in graph.output if output.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_param = "rows"
        serialized: bytes = loaded.SerializeToString()
        return serialized

    def new_cache(self, adapter: Adapter | None = None) -> RowsCache:
        return RowsCache(self, adapter)


class RowsCache(OnnxCache):
    """One sequence: as a step's logits are the last's, `rows` gives those of more positions."""

    def __init__(self, backend: RowsBackend, adapter: Adapter | None) -> None:
        self._first_row = np.array([-1], np.int64)
        self._vocab_size = backend.vocab_size
        super().__init__(backend, adapter)

    def rows(self, ids: Ids, first: int) -> Floats:
        """As the function `rows`."""
        logits = np.empty((1, len(ids) - first, self._vocab_size), np.float32)
        self._first_row[0] = first
        self._bind_output("logits", logits)
        try:
            self.prefill(ids)
        finally:
            self._first_row[0] = -1
            self._bind_output("logits", self._logits)
        found: Floats = logits[0]
        return found

    def _bind_inputs(self, adapter: Adapter | None) -> None:
        super()._bind_inputs(adapter)
        self._bind_input(_FIRST_ROW, self._first_row)
