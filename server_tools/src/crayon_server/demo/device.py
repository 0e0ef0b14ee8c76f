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

from crayon_runtime import Engine
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS, log_loss

if TYPE_CHECKING:
    from crayon_runtime import Generation

SWAPS = 50
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
    """Answer everything, and swap adapters live: base and adapters take turns at every query."""
    started = time.perf_counter()
    with Engine.load(Path(job.bundle), threads=job.threads) as engine:
        load_seconds = time.perf_counter() - started
        first_swaps = [_swap_ms(engine, name) for name in job.adapters]
        live = {}
        for model in (BASE, *job.adapters):
            _set_model(engine, model)
            live[model] = engine.generate(job.shared_prompt, max_new_tokens=MAX_NEW_TOKENS).text
        first, second = job.adapters[:2]
        interrupted = _swap_while_answering(engine, job.shared_prompt, first, second)

        speeds = {model: _Speed() for model in live}
        runs = {(model, user): Run(model, user, [], 0.0) for model in live for user in job.texts}
        for user, texts in job.texts.items():
            for text, model in itertools.product(texts, live):
                _set_model(engine, model)
                generation = engine.generate(text.prompt, max_new_tokens=MAX_NEW_TOKENS)
                runs[model, user].answers.append(generation.text)
                speeds[model].add(generation)
        swaps = [_swap_ms(engine, job.adapters[i % len(job.adapters)]) for i in range(SWAPS)]
        peak_rss_bytes = _peak_rss_bytes()
        for (model, user), run in runs.items():
            _set_model(engine, model)
            run.log_loss = log_loss(engine, job.texts[user])
    return Measurements(
        runs=list(runs.values()),
        live=live,
        running_answer_kept=interrupted == live[first],
        load_seconds=load_seconds,
        first_swap_ms=median(first_swaps),
        swap_ms=median(swaps),
        first_token_ms=median(speeds[BASE].first_token_seconds) * 1e3,
        base_tokens_per_second=speeds[BASE].tokens_per_second,
        adapter_tokens_per_second=median(speeds[name].tokens_per_second for name in job.adapters),
        peak_rss_bytes=peak_rss_bytes,
        torch_loaded="torch" in sys.modules,
    )


class _Speed:
    """Timings of answers, added up."""

    def __init__(self) -> None:
        self.first_token_seconds: list[float] = []
        self.tokens = 0
        self.seconds = 0.0

    def add(self, answer: Generation) -> None:
        self.first_token_seconds.append(answer.first_token_seconds)
        self.tokens += answer.generated_tokens - 1
        self.seconds += answer.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Decoded, the first token of each answer left out."""
        return self.tokens / self.seconds


def _set_model(engine: Engine, model: str) -> None:
    engine.set_adapter(None if model == BASE else model)


def _swap_ms(engine: Engine, adapter: str) -> float:
    started = time.perf_counter()
    engine.set_adapter(adapter)
    return (time.perf_counter() - started) * 1e3


def _swap_while_answering(engine: Engine, prompt: str, first: str, second: str) -> str:
    """The answer of `first`, although `second` is set after its third token."""
    engine.set_adapter(first)
    with engine.stream(prompt, max_new_tokens=MAX_NEW_TOKENS) as stream:
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
