"""The engine at TinyLlama-1.1B's shapes: against a bare loop, with adapters, and swapping them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from benchmarks.bundles import bytes_per_token, tinyllama
from benchmarks.measure import interleaved, rate, speed_ratio
from benchmarks.table import Row
from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from crayon_runtime.probe import read_bandwidth

THREADS, TOKENS = 2, 24
LOADS, ROUNDS = 6, 4
"""Where the weights of a session lie in memory makes it up to 3 % faster or slower, so sessions are loaded anew, in turns."""


def run(work: Path) -> Iterator[Row]:
    with_slots, without_slots = tinyllama(work), tinyllama(work, slots=False)
    loads = []
    for load in range(LOADS):
        order = [with_slots, without_slots][:: 1 if load % 2 else -1]
        engines = {bundle: Engine.load(bundle, threads=THREADS) for bundle in order}
        loads.append(_interleaved(engines[with_slots], engines[without_slots]))
        for engine in engines.values():
            engine.close()
    nbytes = bytes_per_token(with_slots)
    bandwidth = read_bandwidth(nbytes, THREADS)
    tokens_per_second = rate([s for seconds in loads for s in seconds["engine"]], TOKENS)
    yield Row(
        "TinyLlama-1.1B shapes, int4: decode, and share of the read bandwidth",
        "",
        f"{tokens_per_second:.1f} tok/s, {tokens_per_second * nbytes / bandwidth:.0%} of {bandwidth / 1e9:.1f} GB/s",
    )
    for what, of, to, reach in (
        ("engine loop against a bare onnxruntime loop of the same graph", "engine", "bare", 0.97),
        ("no adapter, against a graph without slots", "engine", "no slots", 0.96),
        ("r = 16 adapter on all linears, against a graph without slots", "adapter", "no slots", 0.88),
    ):
        ratios = [speed_ratio(seconds, of, to) for seconds in loads]
        ratio = geometric_mean(ratios)
        yield Row(what, f">= {reach}", f"{ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f})", ratio >= reach)
    with Engine.load(with_slots, threads=THREADS) as engine:
        yield from _swap(engine, engine.bundle.adapter_names[0])


def _interleaved(engine: Engine, without_slots: Engine) -> dict[str, list[float]]:
    adapter = engine.bundle.adapter_names[0]

    def generate(which: Engine, adapter: str | None) -> Callable[[], None]:
        def call() -> None:
            if which is engine:
                which.set_adapter(adapter)
            done = which.generate([1], max_new_tokens=TOKENS, ignore_eos=True)
            assert done.generated_tokens == TOKENS

        return call

    return interleaved(
        {
            "bare": _bare_loop(engine),
            "engine": generate(engine, None),
            "no slots": generate(without_slots, None),
            "adapter": generate(engine, adapter),
        },
        ROUNDS,
    )


def _swap(engine: Engine, adapter: str) -> Iterator[Row]:
    """What a swap adds to the time of the first token."""
    first = engine.bundle.adapter(adapter).path

    def first_token(select: Callable[[], None]) -> float:
        started = time.perf_counter()
        select()
        engine.generate([1], max_new_tokens=1)
        return time.perf_counter() - started

    warm, cold, none = [], [], []
    for _ in range(9):
        engine.set_adapter(adapter)
        engine.generate([1], max_new_tokens=1)
        none.append(first_token(lambda: None))
        engine.set_adapter(None)
        engine.generate([1], max_new_tokens=1)
        warm.append(first_token(lambda: engine.set_adapter(adapter)))
        engine.set_adapter(None)
        engine.generate([1], max_new_tokens=1)
        # An engine keeps what it has read; this reads the file each time.
        cold.append(first_token(lambda: engine.set_adapter(engine.backend.read_adapter(Bundle.open(first)))))
    for what, times, reach in (("already read", warm, 5), ("from a file", cold, 150)):
        added = 1e3 * (float(np.median(times)) - float(np.median(none)))
        yield Row(
            f"adapter swap at 1.1B shapes, r = 16, {what}", f"<= {reach} ms", f"{max(added, 0):.1f} ms", added <= reach
        )


def _bare_loop(engine: Engine) -> Callable[[], None]:
    """Greedy decoding in the engine's session with onnxruntime alone: bound buffers, one call and one argmax a token.

    No text, no taps, no checks.
    """
    model, session = engine.bundle.model, engine.backend.session
    a = model.architecture
    binding = session.io_binding()
    token, mask = np.ones((1, 1), np.int64), np.ones((1, model.context_length), np.int64)
    logits = np.zeros((1, 1, a.vocab_size), np.float32)
    kv_shape = (1, a.kv_heads, model.context_length, a.head_size)
    caches = {
        f"{layer}.{side}": np.zeros(kv_shape, np.float32) for layer in range(a.passes) for side in ("key", "value")
    }
    taps = {name: np.zeros((1, a.hidden_size), np.float32) for name in ("tap_sum", "tap_last")}

    def bind(bind_one: Callable[..., None], name: str, array: np.ndarray) -> None:
        bind_one(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    bind(binding.bind_input, "input_ids", token)
    bind(binding.bind_output, "logits", logits)
    for name, array in taps.items():
        bind(binding.bind_output, name, array)
    for name, array in caches.items():
        bind(binding.bind_input, f"past_key_values.{name}", array)
        bind(binding.bind_output, f"present.{name}", array)

    kept = caches, taps  # bound by address

    def loop() -> None:
        assert kept
        token[0, 0] = 1
        for length in range(1, TOKENS + 1):
            binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, length), mask.ctypes.data)
            session.run_with_iobinding(binding)
            token[0, 0] = logits[0, 0].argmax()

    return loop
