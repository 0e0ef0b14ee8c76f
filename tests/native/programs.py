"""Programs for the runner's tests: two-layer models with dense random weights through the official exporter, once for all tests.

CRAYON_TEST_PROGRAMS names a folder to keep them in between runs; making them takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONTEXT = 256
"""Tokens that the programs' caches hold, and that they take at once."""

PROMPT = (1, 17, 300, 44, 5, 9, 200)
STEPS = 20


class Program(NamedTuple):
    path: Path
    data: tuple[Path, ...]


class Programs(NamedTuple):
    """What `crayon export` writes: a model and an adapter for it, with an fp32 cache; another model with an int8 cache."""

    model: Program
    adapter: Program
    int8: Program


@cache
def exported() -> Programs:
    """The programs. They are made by another process, which is gone with torch's memory when they are there."""
    folder = Path(os.environ.get("CRAYON_TEST_PROGRAMS") or _temporary().name)
    for kind in ("fp32", "int8"):
        if not (folder / kind / "manifest.json").is_file():
            subprocess.run([sys.executable, "-m", "tests.native.programs", str(folder), kind], check=True)
    model, int8, adapter = (folder / "fp32", folder / "int8", folder / "fp32/adapters/adapter")
    return Programs(
        Program(model / "model.pte", (model / "model.ptd",)),
        Program(adapter / "adapter.pte", (model / "model.ptd", adapter / "adapter.ptd")),
        Program(int8 / "model.pte", (int8 / "model.ptd",)),
    )


class Answer(NamedTuple):
    """Greedy decoding from PROMPT: the token after each step, and what the steps returned, the first row of the prompt."""

    tokens: list[int]
    logits: NDArray[np.float32]
    tap_sum: NDArray[np.float32]
    tap_last: NDArray[np.float32]


@cache
def official(program: Program, method: str) -> Answer:
    """What ExecuTorch's own runtime, the one with torch, answers. It runs in another process."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "answer.npz")
        work = [str(to), method, str(program.path), *map(str, program.data)]
        subprocess.run([sys.executable, "-m", "tests.native.programs", "run", *work], check=True, capture_output=True)
        with np.load(to) as known:
            return Answer(known["tokens"].tolist(), known["logits"], known["tap_sum"], known["tap_last"])


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _export(folder: Path, kind: str) -> None:
    from crayon_export.exporter import export
    from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer

    model = tiny_llama(folder / "source", hidden_size=128, intermediate_size=256, max_position_embeddings=CONTEXT)
    tiny_tokenizer(model)
    adapters = [tiny_adapter(model, folder / "adapter")] if kind == "fp32" else []
    export(model, folder / kind, backend="executorch", group_size=32, kv_dtype=kind, adapters=adapters)


def _run(to: Path, method: str, program: Path, *data: Path) -> None:
    import torch
    from executorch.exir._serialize._cord import Cord
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::*
    from executorch.kernels import quantized  # noqa: F401
    from executorch.runtime import Runtime

    # This runtime takes one data file: those of an adapter are put together.
    payloads = [FlatTensorSerializer().deserialize(Cord(path.read_bytes())) for path in data]
    buffers, named = [], {}
    for payload in payloads:
        named |= {k: _moved(entry, len(buffers)) for k, entry in payload.named_data.items()}
        buffers += payload.buffers
    merged = to.with_suffix(".ptd")
    merged.write_bytes(bytes(FlatTensorSerializer().serialize(DataPayload(buffers, named))))

    run = Runtime.get().load_program(program, data_path=merged).load_method(method)
    fed, position, tokens, steps = list(PROMPT), 0, [], []
    for _ in range(STEPS):
        outputs = run.execute([torch.tensor([fed]), torch.tensor([position])])
        steps.append([o.numpy().reshape(-1).copy() for o in outputs])
        position += len(fed)
        fed = [int(steps[-1][0].argmax())]
        tokens += fed
    logits, tap_sum, tap_last = (np.stack(column) for column in zip(*steps, strict=True))
    np.savez(to, tokens=tokens, logits=logits, tap_sum=tap_sum, tap_last=tap_last)


def _moved(entry: Any, by: int) -> Any:
    from dataclasses import replace

    return replace(entry, buffer_index=entry.buffer_index + by)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _run(Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:]))
    else:
        _export(Path(sys.argv[1]), sys.argv[2])
