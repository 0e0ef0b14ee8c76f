"""How weights find their codes: perplexity and KL to the float model for each rounding, format and group size, on texts held out.

Judged with the weights as each backend holds them, and activations in float32: what the rounding does, without what int8 activations add.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.parity import STORIES
from benchmarks.table import Row
from crayon_export import export
from crayon_export.architecture import read
from crayon_export.checkpoint import Checkpoint, Fingerprint
from crayon_export.executorch.storage import ProgramStorage, weights_form
from crayon_export.onnx.storage import OnnxStorage
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise
from crayon_export.reference import forward
from crayon_export.rounding import ROUNDINGS, Clipping, nearest
from crayon_export.storage import Storage
from crayon_export.streaming import WrittenWeights
from crayon_runtime import Engine
from crayon_runtime.golden import kl_divergence, log_softmax
from crayon_server.data.phone_assistant import stream
from crayon_server.models import load_nano

Ids = npt.NDArray[np.int64]

TOKENS = 8192
"""Of calibration texts, and of texts to judge by."""

FORMATS = (Blockwise(8, 32), Blockwise(4, 32), Blockwise(4, 64), Blockwise(4, 128))


def run(work: Path) -> Iterator[Row]:
    for name, folder, texts in (("stories260K", STORIES, _sampled), ("nano", load_nano(), _requests)):
        bundle = export(folder, work / f"{name}-fp32.bundle", quantize="none", replace=True).bundle
        with Engine.load(bundle) as engine:
            calibration, held_out = (texts(engine, seed) for seed in (0, 1))
        for backend, blockwise in itertools.product(("onnx", "executorch"), FORMATS):
            results = [judged(folder, backend, blockwise, r, calibration, held_out) for r in ROUNDINGS]
            measured = ", ".join(f"{r} {p:.3f} {kl:.2e}" for r, (_, p, kl) in zip(ROUNDINGS, results, strict=True))
            yield Row(
                f"{name}, {backend}, {_described(backend, blockwise)}: perplexity (float {results[0][0]:.3f}) and KL in nats",
                "",
                measured,
            )


def judged(
    folder: Path, backend: str, blockwise: Blockwise, rounding: str, calibration: Sequence[Ids], held_out: Sequence[Ids]
) -> tuple[float, float, float]:
    """Perplexity of the float and of the quantized model, and the mean KL(float || quantized), over the tokens of texts."""
    checkpoint = Checkpoint.open(folder)
    a = read(checkpoint.config)
    with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as scratch:
        storage: Storage
        if backend == "onnx":
            embedding = "int8" if a.tied_embeddings and blockwise.shared(a.hidden_size) else "fp16"
            data = ExternalData(io.BytesIO(), "unused")
            storage = OnnxStorage(data, blockwise=blockwise, embedding=embedding, tied=a.tied_embeddings, pool=pool)
        else:
            storage = ProgramStorage(Path(scratch), weights=weights_form(blockwise), tied=a.tied_embeddings, pool=pool)
        weights = WrittenWeights(
            checkpoint,
            a,
            Fingerprint(),
            [storage],
            adapters=[],
            merged=None,
            rounding=Clipping(pool) if rounding == "mse" else nearest,
            calibration=calibration if rounding == "gptq" else (),
            on_bytes=lambda _: None,
        )
        every = np.arange(sum(map(len, held_out)))
        exact, quantized = forward(a, weights, held_out, positions=every, tap_layer=a.layers).logits
    return _perplexity(exact, held_out), _perplexity(quantized, held_out), float(kl_divergence(exact, quantized).mean())


def _described(backend: str, blockwise: Blockwise) -> str:
    by_row = backend == "executorch" and blockwise.bits == 8
    return f"{blockwise.name} {'by row' if by_row else f'in groups of {blockwise.group_size}'}"


def _perplexity(logits: npt.NDArray[np.float32], sequences: Sequence[Ids]) -> float:
    """Of each token after the first of its sequence, given those before it."""
    losses, start = [], 0
    for ids in sequences:
        log_p = log_softmax(logits[start : start + len(ids) - 1])
        losses.append(-log_p[np.arange(len(ids) - 1), ids[1:]])
        start += len(ids)
    return float(np.exp(np.concatenate(losses).mean()))


def _sampled(engine: Engine, seed: int) -> list[Ids]:
    """Stories that the float model tells: what it was trained on is not at hand."""
    sequences: list[Ids] = []
    while (count := sum(map(len, sequences))) < TOKENS:
        story = engine.generate([1], max_new_tokens=255, temperature=1.0, seed=(seed << 20) + count)
        sequences.append(np.array([1, *story.token_ids], np.int64))
    return sequences


def _requests(engine: Engine, seed: int) -> list[Ids]:
    """Requests and their answers, from the world that nano was trained on; other draws than it saw."""
    sequences: list[Ids] = []
    examples = stream(f"rounding {seed}")
    while sum(map(len, sequences)) < TOKENS:
        example = next(examples)
        ids = engine.tokenizer.encode(example.prompt + example.completion)
        sequences.append(np.array([*ids, engine.tokenizer.info.eos[0]], np.int64))
    return sequences
