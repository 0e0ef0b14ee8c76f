"""One backend of the demo, in a process of its own: how fast it loads, reads and answers, what it takes, and what it says; without torch.

Reads a `Job` from stdin and writes `Measured` to stdout, both JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from crayon_runtime import Engine, golden
from crayon_runtime.bundle import Bundle
from crayon_runtime.probe import peak_memory

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends import Cache

PREFILL, DECODE = 128, 64
"""Tokens of a prompt, and of an answer, whose time is taken: alone, so the answer begins at position 1."""
REPETITIONS = 7
"""Of each; one more goes before them and does not count."""


class Job(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        texts: each a prompt, which is answered greedily, and what else may continue it, each of whose tokens is scored; where there are
            none, only load, speed and memory are measured, and the golden cases are left out too.
        logits: the file for the scores: float32 [tokens, V], as numpy writes it.
    """

    bundle: str
    backend: str
    threads: int | None
    texts: list[tuple[str, str]]
    max_new_tokens: int
    logits: str


class GoldenCase(msgspec.Struct, frozen=True):
    """A case of the bundle's own; errors are relative to the spread of what is right."""

    passed: bool
    error: float
    tolerance: float


class Measured(msgspec.Struct, frozen=True):
    """What one process measured.

    Attributes:
        load_seconds: from nothing to the first token, with importing the backend's library.
        peak_rss_bytes: of the process, after load and speeds.
        prefill_seconds, decode_seconds: of each repetition, for `PREFILL` and `DECODE` tokens.
        answers: token ids, of each text.
    """

    load_seconds: float
    peak_rss_bytes: int
    prefill_seconds: list[float]
    decode_seconds: list[float]
    answers: list[list[int]]
    golden: list[GoldenCase]
    torch_loaded: bool


def measure(job: Job) -> Measured:
    """Load and speed first, then memory, then what is said."""
    bundle = Bundle.open(Path(job.bundle))
    started = time.perf_counter()
    with Engine.load(bundle, backend=job.backend, threads=job.threads) as engine:
        cache = engine.backend.new_cache()
        cache.prefill(np.zeros(1, np.int64))
        load_seconds = time.perf_counter() - started
        seconds = [_speed(cache, engine.backend.vocab_size) for _ in range(1 + REPETITIONS)][1:]
        peak_rss_bytes = peak_memory()
        answers = [engine.generate(prompt, max_new_tokens=job.max_new_tokens).token_ids for prompt, _ in job.texts]
        if job.texts:
            np.save(job.logits, np.concatenate([_scores(engine, cache, *text) for text in job.texts]))
        cache.close()
    replayed = golden.replay(bundle, backend=job.backend, threads=job.threads) if job.texts else []
    return Measured(
        load_seconds=load_seconds,
        peak_rss_bytes=peak_rss_bytes,
        prefill_seconds=[prefill for prefill, _ in seconds],
        decode_seconds=[decode for _, decode in seconds],
        answers=answers,
        golden=[GoldenCase(case.passed, case.logit_error, case.tolerance.logits) for case in replayed],
        torch_loaded="torch" in sys.modules,
    )


def _speed(cache: Cache, vocab_size: int) -> tuple[float, float]:
    """Seconds of a prompt alone and of an answer alone. What the tokens are does not matter."""
    ids = np.arange(PREFILL, dtype=np.int64) % vocab_size
    cache.rewind(0)
    started = time.perf_counter()
    cache.prefill(ids)
    read = time.perf_counter()
    cache.rewind(1)
    for token in range(DECODE):
        cache.decode(token % vocab_size)
    return read - started, time.perf_counter() - read


def _scores(engine: Engine, cache: Cache, prompt: str, completion: str) -> npt.NDArray[np.float32]:
    """float32 [tokens of the completion, V]: what scored each of them, given all that stands before it."""
    tokenizer = engine.tokenizer
    start = len(tokenizer.encode(prompt))
    ids = np.array(tokenizer.encode(prompt + completion), np.int64)
    cache.rewind(0)
    scores = [cache.prefill(ids[:start]).logits.copy()]
    scores += [cache.decode(int(token)).logits.copy() for token in ids[start:-1]]
    return np.stack(scores)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
