"""The measurements themselves: an engine goes in, samples come out. All of them are of one process.

Prefill and decode are those of the backend, as llama-bench measures: pseudo-random tokens, nothing is sampled. TTFT is that of the whole
engine. Every test runs once to warm up, apart, and then `rounds` times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Literal

import numpy as np

from crayon_runtime.customized import ADAPTER, EXAMPLES, kept_examples
from crayon_runtime.errors import CrayonError
from crayon_runtime.examples import score
from crayon_runtime.probe import cores, read_bandwidth
from crayon_runtime.profile.memory import memory
from crayon_runtime.profile.records import Absent, LongRun, Observation, Sample, TestName
from crayon_runtime.session import PREFILL_CHUNK

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter, Cache
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.engine import Engine
    from crayon_runtime.profile.jobs import Measure
    from crayon_runtime.profile.sensors import Sensors

    Ids = npt.NDArray[np.int64]

Phase = Literal["started", "loaded", "prefill", "decode", "end", "long"]

ANSWER = 16
"""Tokens of the answers whose routing is timed."""

TEN = 10
"""Examples that a customization is made of."""

_MATRIX = 512
_WINDOW = 1.0
"""Seconds between two looks at the machine in a long run."""


class Watch:
    """Looks at the process and the machine, between measurements and never during one."""

    def __init__(self, sensors: Sensors, folder: Path, process: int) -> None:
        self.sensors = sensors
        self._folder = folder
        self._process = process
        self._began = perf_counter_ns()

    def sample(self, phase: Phase, avg_ts: float | None = None) -> Sample:
        rss, pss, mapped, peak = memory(self._folder)
        return Sample(
            process=self._process,
            phase=phase,
            t_ns=perf_counter_ns() - self._began,
            rss_bytes=rss,
            pss_bytes=pss,
            mapped_bytes=mapped,
            peak_rss_bytes=peak,
            frequency_hz=self.sensors.frequency(),
            temperature_c=self.sensors.temperature(),
            throttled=self.sensors.throttled(),
            energy_j=self.sensors.energy(),
            power_w=self.sensors.power(),
            avg_ts=avg_ts,
        )


def measure(engine: Engine, job: Measure, watch: Watch, folder: Path) -> Iterator[Observation | Sample | Absent]:
    """Every test of a job. The cache is filled once: decodes begin at the greatest depth, and go back to the next.

    Args:
        folder: where the model's customization is kept, if there is one.
    """
    adapter = engine.present_adapter
    yield watch.sample("loaded")
    yield _first_token(engine)
    cache = engine.backend.new_cache(adapter)
    try:
        for n in job.prompts:
            yield prefill(cache, n, job.rounds, engine.backend.vocab_size, adapter)
        yield watch.sample("prefill")
        deepest = max(job.depths, default=0)
        cache.rewind(0)
        feed(cache, token_ids(deepest, engine.backend.vocab_size))
        for depth in sorted(job.depths, reverse=True):
            yield decode(cache, depth, job.generate, job.rounds, engine.backend.vocab_size, adapter)
        yield watch.sample("decode")
    finally:
        cache.close()
    for n in job.prompts:
        yield first_tokens(engine, n, job.rounds)
    if job.more:
        yield from swaps(engine, job.rounds)
        yield from customized(engine, folder, job.rounds)
    yield watch.sample("end")


def token_ids(n: int, vocab_size: int, start: int = 0) -> Ids:
    """int64 [n]: tokens that are in no order, the same ones every time, as crayon-bench feeds."""
    return (np.arange(start, start + n, dtype=np.int64) * 7919) % vocab_size


def feed(cache: Cache, ids: Ids) -> None:
    """Append tokens, in the chunks that the engine feeds."""
    for start in range(0, len(ids), PREFILL_CHUNK):
        cache.prefill(ids[start : start + PREFILL_CHUNK])


def prefill(cache: Cache, n: int, rounds: int, vocab_size: int, adapter: Adapter | None = None) -> Observation:
    """Feeding `n` tokens from position 0."""
    ids = token_ids(n, vocab_size)

    def once() -> int:
        cache.rewind(0)
        began = perf_counter_ns()
        feed(cache, ids)
        return perf_counter_ns() - began

    warm, *samples = [once() for _ in range(1 + rounds)]
    return _observed("prefill", samples, [warm], adapter, n_prompt=n)


def decode(
    cache: Cache, depth: int, n: int, rounds: int, vocab_size: int, adapter: Adapter | None = None
) -> Observation:
    """Feeding `n` tokens one by one from position `depth`, which the cache has reached; the time of each of them is kept."""
    tokens = token_ids(n, vocab_size, depth).tolist()

    def once() -> list[int]:
        cache.rewind(depth)
        step, clock = cache.decode, perf_counter_ns
        times = [0] * (n + 1)
        times[0] = clock()
        for i, token in enumerate(tokens, 1):
            step(token)
            times[i] = clock()
        return times

    warm, *all_times = [once() for _ in range(1 + rounds)]
    each = [[after - before for before, after in pairwise(times)] for times in all_times]
    return _observed(
        "decode",
        [times[-1] - times[0] for times in all_times],
        [warm[-1] - warm[0]],
        adapter,
        n_gen=n,
        n_depth=depth,
        token_ns=each,
    )


def first_tokens(engine: Engine, n: int, rounds: int) -> Observation:
    """TTFT of the whole engine with prompts of `n` tokens that have nothing in common with the one before."""
    vocab_size = engine.backend.vocab_size
    prompts = [token_ids(n, vocab_size, start=1 + i).tolist() for i in range(1 + rounds)]
    answers = [engine.generate(prompt, max_new_tokens=1, ignore_eos=True) for prompt in prompts]
    warm, *samples = [round(answer.first_token_seconds * 1e9) for answer in answers]
    return _observed("ttft", samples, [warm], engine.present_adapter, n_prompt=n, n_gen=1)


def swaps(engine: Engine, rounds: int) -> Iterator[Observation | Absent]:
    """The time until the first token: with the base as before, after a swap to an adapter that was read, and from its file."""
    names = engine.bundle.adapter_names if engine.bundle is not None else []
    if engine.bundle is None or not names:
        yield Absent(what="adapter swap", reason="there are no adapters in the bundle")
        return
    inside, before = engine.bundle.adapter(names[0]), engine.present_adapter
    known = engine.find_adapter(inside)

    def timed(select: Callable[[], Adapter | None]) -> int:
        engine.set_adapter(None)
        engine.generate([1], max_new_tokens=1)
        began = perf_counter_ns()
        engine.set_adapter(select())
        engine.generate([1], max_new_tokens=1)
        return perf_counter_ns() - began

    tests: dict[TestName, Callable[[], Adapter | None]] = {
        "swap_none": lambda: None,
        "swap_read": lambda: known,
        "swap_file": lambda: engine.read_adapter(inside),
    }
    for test, select in tests.items():
        warm, *samples = [timed(select) for _ in range(1 + rounds)]
        yield _observed(test, samples, [warm], known, n_prompt=1, n_gen=1)
    engine.set_adapter(before)


def customized(engine: Engine, folder: Path, rounds: int) -> Iterator[Observation | Absent]:
    """What a customized model does beside answering: the forward passes of the affinity of ten of its examples, and routing.

    What follows the forward passes, a product with the pool's projection, takes microseconds.
    """
    if not (folder / EXAMPLES).exists():
        reason = "the model is not customized here: see `crayon customize`"
        yield from (Absent(what=what, reason=reason) for what in ("affinity of ten examples", "routing overhead"))
        return
    try:
        examples = kept_examples(folder)[:TEN]
        adapter = engine.find_adapter(folder / ADAPTER)
        times = []
        for _ in range(1 + rounds):
            began = perf_counter_ns()
            score(engine, examples)
            times.append(perf_counter_ns() - began)
        yield _observed("affinity", times[1:], times[:1])
        asked = [examples[i % len(examples)].prompt for i in range(1 + rounds)]
        answers = [
            engine.answer(prompt, max_new_tokens=ANSWER, ignore_eos=True, adapter=adapter).seconds for prompt in asked
        ]
        tests: dict[TestName, str] = {"routing_answer": "device", "routing_score": "score"}
        for test, part in tests.items():
            warm, *samples = [round(seconds.get(part, 0.0) * 1e9) for seconds in answers]
            if min(samples) > 0:
                yield _observed(test, samples, [warm], adapter, n_gen=ANSWER)
            else:
                yield Absent(what="routing overhead", reason="an answer was not judged")
    except CrayonError as e:
        yield Absent(what="affinity of ten examples, and routing overhead", reason=str(e))


def controls(read_bytes: int, threads: int | None, rounds: int) -> Iterator[Observation]:
    """The machine without any model, which tells whether it was as fast as at another time: reading memory, and multiplying matrices.

    Args:
        read_bytes: of the model's weights; it takes as much memory, so the model is closed before.
    """
    per_second = [read_bandwidth(read_bytes, threads or cores(), repetitions=1) for _ in range(rounds)]
    yield Observation(
        test="control_read", nbytes=read_bytes, samples_ns=[round(read_bytes * 1e9 / b) for b in per_second]
    )
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    times = []
    for _ in range(1 + rounds):
        began = perf_counter_ns()
        matrix @ matrix
        times.append(perf_counter_ns() - began)
    yield Observation(test="control_matmul", nbytes=2 * _MATRIX**3, warmup_ns=times[:1], samples_ns=times[1:])


def long_run(engine: Engine, seconds: float, watch: Watch) -> Iterator[Sample | LongRun]:
    """Decode without a pause, and look at the machine once a second."""
    sensors, vocab_size = watch.sensors, engine.backend.vocab_size
    cache = engine.backend.new_cache(engine.present_adapter)
    windows: list[tuple[int, float]] = []
    used: dict[str, float] = {}
    try:
        first = watch.sample("long")
        last = first
        yield first
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            window, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - window) < min(_WINDOW, seconds):
                if cache.length == engine.backend.context_length:
                    cache.rewind(0)
                cache.decode(cache.length * 7919 % vocab_size)
                count += 1
            windows.append((count, spent))
            for name, watts in sensors.power().items():
                used[name] = used.get(name, 0.0) + watts * spent
            last = watch.sample("long", avg_ts=count / spent)
            yield last
    finally:
        cache.close()
    tenth = max(1, len(windows) // 10)
    yield LongRun(
        seconds=time.perf_counter() - began,
        n_gen=sum(count for count, _ in windows),
        first_ts=_speed(windows[:tenth]),
        last_ts=_speed(windows[-tenth:]),
        energy_j=used | _increase(first.energy_j, last.energy_j),
        throttled={name: round(rise) for name, rise in _increase(first.throttled, last.throttled).items()},
    )


def files_of(bundle: Bundle) -> list[Path]:
    """All files that the manifest lists."""
    return [bundle.path / file.path for file in bundle.manifest.files]


def _first_token(engine: Engine) -> Observation:
    """The first answer of this process, with what the backend does only then."""
    answer = engine.generate([1], max_new_tokens=1, ignore_eos=True)
    return _observed("first_token", [round(answer.first_token_seconds * 1e9)], [], engine.present_adapter, n_prompt=1)


def _observed(
    test: TestName, samples: list[int], warm: list[int], adapter: Adapter | None = None, **numbers: object
) -> Observation:
    fields = {"test": test, "samples_ns": samples, "warmup_ns": warm, "adapter": adapter.name if adapter else None}
    return Observation(**fields, **numbers)  # type: ignore[arg-type]


def _speed(windows: list[tuple[int, float]]) -> float:
    return sum(count for count, _ in windows) / sum(spent for _, spent in windows)


def _increase(before: dict[str, float] | dict[str, int], after: dict[str, float] | dict[str, int]) -> dict[str, float]:
    return {name: after[name] - value for name, value in before.items() if name in after}
