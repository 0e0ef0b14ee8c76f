"""The profiler: what it adds to a decode, whether its numbers are right, and what `crayon profile compare` finds and does not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mobilellm
from benchmarks.measure import interleaved
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Engine
from crayon_runtime.backends.base import Adapter, Cache, Step
from crayon_runtime.profile import Profile, compare
from crayon_runtime.profile.jobs import Describe, Job, Measure
from crayon_runtime.profile.measure import decode, feed, token_ids
from crayon_runtime.profile.records import Header, Line, Observation, Sample
from crayon_runtime.profile.run import Configuration, tests_of
from crayon_runtime.profile.target import Local, Target, results
from crayon_runtime.profile.worker import load_engine, main
from crayon_server.models import load_nano

PAIRS, REPETITIONS = 20, 5
DEPTH, TOKENS, ROUNDS = 64, 16, 600
SAMPLES = 200
"""Rounds of each process, so that a decode of nano takes about as long as one of a real model."""
THREADS = 1
INJECTED = 0.1

_ALONE = Configuration(THREADS, None)


def run(work: Path) -> Iterator[Row]:
    bundle = export(load_nano(), work / "profile.bundle", quantize="int4", replace=True).bundle.path
    with Engine.load(bundle, backend="onnx", threads=THREADS) as engine:
        yield _overhead(engine)
    # Of nano a tenth of a token is the engine's own, which llama-bench does not measure either.
    with Engine.load(mobilellm.bundle(work, "mobilellm-125m", "onnx"), backend="onnx", threads=THREADS) as engine:
        yield _against_a_loop(engine)
    yield from _pairs(bundle)


def _overhead(engine: Engine) -> Row:
    cache = engine.backend.new_cache()
    feed(cache, token_ids(DEPTH, engine.backend.vocab_size))
    token = _undisturbed([ns / 1e9 for ns in _decoded(engine, cache, ROUNDS)]) / TOKENS
    added = _added_to_a_token()
    return Row(
        "profiler's own overhead on decode, nano: its loop over a cache that computes nothing, against a bare one",
        "<= 1 %",
        f"{added / token:.2%} ({added * 1e9:.0f} ns of {token * 1e6:.0f} us)",
        added <= 0.01 * token,
    )


def _decoded(engine: Engine, cache: Cache, rounds: int) -> list[int]:
    return decode(cache, DEPTH, TOKENS, rounds, engine.backend.vocab_size).samples_ns


def _against_a_loop(engine: Engine) -> Row:
    backend = engine.backend
    cache = backend.new_cache()
    feed(cache, token_ids(DEPTH, backend.vocab_size))
    tokens = token_ids(TOKENS, backend.vocab_size, DEPTH).tolist()
    session = engine.session()
    session.prefill(token_ids(DEPTH, backend.vocab_size))
    prompt = token_ids(DEPTH + 1, backend.vocab_size)
    reported: list[int] = []

    def profiled() -> None:  # once to warm up, and once
        reported.extend(_decoded(engine, cache, 1))

    def by_hand() -> None:
        session.begin(prompt, None)
        for token in tokens:
            session.decode(token)

    seconds = interleaved({"profiled": profiled, "by hand": by_hand}, ROUNDS // 10)
    by_profiler = TOKENS / _undisturbed([ns / 1e9 for ns in reported[1:]])
    hand = TOKENS / _undisturbed(seconds["by hand"])
    return Row(
        "decode reported by the profiler, against a timing loop over the engine's session, MobileLLM-125M shapes",
        "within 2 %",
        f"{by_profiler:.1f} and {hand:.1f} tok/s: {by_profiler / hand - 1:+.2%}",
        abs(by_profiler / hand - 1) <= 0.02,
    )


class _Nothing:
    """A cache that computes nothing."""

    def rewind(self, length: int) -> None: ...

    def decode(self, token: int) -> None: ...


def _added_to_a_token() -> float:
    """Seconds that the profiler's loop adds to each token: between differences of models this would be lost."""
    cache: Any = _Nothing()
    tokens, n = token_ids(4096, 512).tolist(), 4096
    reported, bare = [], []
    for _ in range(50):
        reported += [ns / 1e9 for ns in decode(cache, 0, n, 1, 512).samples_ns]
        started = time.perf_counter()
        for token in tokens:
            cache.decode(token)
        bare.append(time.perf_counter() - started)
    return (_undisturbed(reported) - _undisturbed(bare)) / n


def _undisturbed(seconds: list[float]) -> float:
    """The tenth percentile: what else a machine does only slows a loop down."""
    return float(np.percentile(seconds, 10))


def _pairs(bundle: Path) -> Iterator[Row]:
    """Each pair is two profiles of one bundle, one after the other, and a third of it with every call 10 % slower."""
    plain, slow = Local(), Local((sys.executable, "-m", "benchmarks.profile"))
    metrics = false = found = 0
    for pair in range(PAIRS):
        before, after, slower = (_profile(target, bundle) for target in (plain, plain, slow))
        same, changed = compare(before, after), compare(before, slower)
        metrics += sum(not d.control for d in same.differences)
        false += len(same.significant)
        found += any(d.metric.startswith("tg") and d.change > 0 for d in changed.significant)
        print(f"    pair {pair + 1}: {false} of {metrics} false, {found} found", file=sys.stderr, flush=True)
    yield Row(
        f"false significant differences, {PAIRS} pairs of profiles of one bundle",
        "<= 5 % of metrics",
        f"{false / metrics:.1%} ({false} of {metrics})",
        false / metrics <= 0.05,
    )
    share = found / PAIRS
    yield Row("a decode made 10 % slower is found", ">= 90 %", f"{share:.0%} of {PAIRS}", share >= 0.9)


def _profile(target: Target, bundle: Path) -> Profile:
    """What `crayon profile` measures of a decode and a short prompt, without loads, traces and files."""
    lines: list[Line] = []
    observations: list[tuple[int, Observation]] = []
    (header,) = (r for r in results(target, _job(bundle, 0, Describe())) if isinstance(r, Header))
    for process in range(REPETITIONS):
        work = Measure(prompts=[16], depths=[DEPTH], generate=TOKENS, rounds=SAMPLES, more=False)
        for result in results(target, _job(bundle, process, work)):
            if isinstance(result, Observation):
                observations.append((process, result))
            elif isinstance(result, Sample):
                lines.append(result)
    return Profile([header, *lines, *tests_of(observations, _ALONE, header)])


def _job(bundle: Path, process: int, work: Describe | Measure) -> Job:
    return Job(bundle=str(bundle), backend="onnx", adapter=None, threads=THREADS, cpus=None, process=process, work=work)


class _SlowBackend:
    """A backend whose caches take longer for everything."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def new_cache(self, adapter: Adapter | None = None) -> Cache:
        cache: Cache = _SlowCache(self._backend.new_cache(adapter))
        return cache


class _SlowCache:
    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def prefill(self, ids: np.ndarray) -> Step:
        return _slowly(lambda: self._cache.prefill(ids))

    def decode(self, token: int) -> Step:
        return _slowly(lambda: self._cache.decode(token))


def _slowly(call: Any) -> Step:
    began = time.perf_counter()
    step: Step = call()
    until = began + (time.perf_counter() - began) * (1 + INJECTED)
    while time.perf_counter() < until:
        pass
    return step


def _load_slow(path: Path, job: Job) -> Engine:
    engine = load_engine(path, job)
    engine.backend = _SlowBackend(engine.backend)
    return engine


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer, sys.stdout.buffer, _load_slow))
