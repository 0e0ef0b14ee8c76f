"""What ExecuTorch's own runtime, the one with torch, answers with the programs that the runner is tested with."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests import programs

PROMPT = (1, 17, 300, 44, 5, 9, 200)
STEPS = 20


class Program(NamedTuple):
    path: Path
    data: tuple[Path, ...]


class Programs(NamedTuple):
    """A model and an adapter for it, with an fp32 cache; the model with an int8 cache of fewer positions."""

    model: Program
    adapter: Program
    int8: Program


def exported() -> Programs:
    """Those of the bundles that all tests share."""
    model, int8 = programs.exported().path, programs.exported_int8().path
    adapter = model / "adapters/alice"
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
def answer(program: Program, method: str) -> Answer:
    """The official runtime's. It runs in another process."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "answer.npz")
        work = [str(to), method, str(program.path), *map(str, program.data)]
        subprocess.run([sys.executable, "-m", "tests.native.official", *work], check=True, capture_output=True)
        with np.load(to) as known:
            return Answer(known["tokens"].tolist(), known["logits"], known["tap_sum"], known["tap_last"])


def _run(to: Path, method: str, program: Path, *data: Path) -> None:
    import torch
    from executorch.exir._serialize._cord import Cord
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::*
    from executorch.kernels import quantized  # noqa: F401
    from executorch.runtime import Runtime

    # This runtime takes one data file: those of an adapter are put together. A program in a single file takes none.
    payloads = [FlatTensorSerializer().deserialize(Cord(path.read_bytes())) for path in data]
    buffers, named = [], {}
    for payload in payloads:
        named |= {k: _moved(entry, len(buffers)) for k, entry in payload.named_data.items()}
        buffers += payload.buffers
    merged = to.with_suffix(".ptd") if data else None
    if merged is not None:
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
    _run(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
