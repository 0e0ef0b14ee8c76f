"""What the demo runs in a process of its own, as a device would: the runtime and a bundle, without torch.

Reads a `Job` from stdin and writes `Measurements` to stdout, both JSON.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crayon_runtime import Engine

SWAPS = 50
LONGEST_ANSWER = 72
BASE = "base"


class Text(msgspec.Struct, frozen=True):
    prompt: str
    completion: str


class Job(msgspec.Struct):
    bundle: str
    threads: int | None
    adapters: list[str]
    texts: dict[str, list[Text]]
    """Queries by user; each is answered by the base and by every adapter."""
    shared_prompt: str
    """Said to the base and to every adapter, one after the other."""


class Run(msgspec.Struct):
    """One model on one user's queries."""

    model: str
    user: str
    answers: list[str]
    log_loss: float


class Measurements(msgspec.Struct):
    runs: list[Run]
    live: dict[str, str]
    """What base and adapters answer to the shared prompt, swapped between the requests."""
    running_answer_kept: bool
    """Whether an answer stayed the same when the adapter was swapped in its middle."""
    import_seconds: float
    load_seconds: float
    first_swap_ms: float
    """An adapter is read from its file: median over the adapters."""
    swap_ms: float
    """Between adapters that were read before."""
    first_token_ms: float
    """From the request to the first token: median over the requests of the base."""
    base_tokens_per_second: float
    adapter_tokens_per_second: float
    peak_rss_bytes: int
    torch_loaded: bool


def measure(job: Job) -> Measurements:
    """Answer everything, and swap adapters live."""
    started = time.perf_counter()
    from crayon_runtime import Engine

    imported = time.perf_counter()
    with Engine.load(Path(job.bundle), threads=job.threads) as engine:
        loaded = time.perf_counter()
        first_swaps = [_swap_ms(engine, name) for name in job.adapters]
        swaps = [_swap_ms(engine, job.adapters[i % len(job.adapters)]) for i in range(SWAPS)]
        engine.set_adapter(None)
        engine.generate(job.shared_prompt, max_new_tokens=LONGEST_ANSWER)  # warm-up
        runs: list[Run] = []
        speeds: dict[str, _Speed] = {}
        for model in (BASE, *job.adapters):
            engine.set_adapter(None if model == BASE else model)
            speeds[model] = _Speed()
            runs += [_run(engine, model, user, texts, speeds[model]) for user, texts in job.texts.items()]
        live = {}
        for model in (BASE, *job.adapters):
            engine.set_adapter(None if model == BASE else model)
            live[model] = engine.generate(job.shared_prompt, max_new_tokens=LONGEST_ANSWER).text
        first, second = job.adapters[:2]
        interrupted = _swap_while_answering(engine, job.shared_prompt, first, second)
    tuned = _Speed.total(speeds[name] for name in job.adapters)
    return Measurements(
        runs=runs,
        live=live,
        running_answer_kept=interrupted == live[first],
        import_seconds=imported - started,
        load_seconds=loaded - imported,
        first_swap_ms=median(first_swaps),
        swap_ms=median(swaps),
        first_token_ms=median(speeds[BASE].first_token_seconds) * 1e3,
        base_tokens_per_second=speeds[BASE].tokens_per_second,
        adapter_tokens_per_second=tuned.tokens_per_second,
        peak_rss_bytes=_peak_rss_bytes(),
        torch_loaded="torch" in sys.modules,
    )


class _Speed:
    """Timings of answers, added up."""

    def __init__(self) -> None:
        self.first_token_seconds: list[float] = []
        self.tokens = 0
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded, the first token of each answer left out."""
        return self.tokens / self.seconds

    @classmethod
    def total(cls, speeds: Iterable[_Speed]) -> _Speed:
        total = cls()
        for speed in speeds:
            total.tokens += speed.tokens
            total.seconds += speed.seconds
        return total


def _run(engine: Engine, model: str, user: str, texts: list[Text], speed: _Speed) -> Run:
    from crayon_server.evaluate.exact_match import log_loss

    answers = []
    for text in texts:
        generation = engine.generate(text.prompt, max_new_tokens=LONGEST_ANSWER)
        answers.append(generation.text)
        speed.first_token_seconds.append(generation.first_token_seconds)
        speed.tokens += generation.generated_tokens - 1
        speed.seconds += generation.decode_seconds
    return Run(model, user, answers, log_loss(engine, texts))


def _swap_ms(engine: Engine, adapter: str) -> float:
    started = time.perf_counter()
    engine.set_adapter(adapter)
    return (time.perf_counter() - started) * 1e3


def _swap_while_answering(engine: Engine, prompt: str, first: str, second: str) -> str:
    """The answer of `first`, although `second` is set after its third token."""
    engine.set_adapter(first)
    with engine.stream(prompt, max_new_tokens=LONGEST_ANSWER) as stream:
        pieces = [piece.text for piece in itertools.islice(stream, 3)]
        engine.set_adapter(second)
        pieces += [piece.text for piece in stream]
    return "".join(pieces)


def _peak_rss_bytes() -> int:
    """Of this process alone; `getrusage` would count what the parent had when it started us."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
