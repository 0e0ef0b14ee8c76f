"""What the demo runs in a process of its own, as a device would: the runtime, a bundle, keys and an address; without torch.

Reads a `Job` from stdin and writes `Measurements` to stdout, both JSON.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from crayon_runtime.customize import ADAPTER, customize
from crayon_runtime.examples import answer_log_loss
from crayon_runtime.probe import peak_memory
from crayon_runtime.remote import PoolClient
from crayon_runtime.routing import Router, SentLog, ServerLLM, sent_log_path
from crayon_runtime.routing.policies import Route
from crayon_runtime.signing import TrustedKeys
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from crayon_runtime import Generation
    from crayon_runtime.routing import Answer

Model = Literal["before", "after", "oracle"]
MODELS: tuple[Model, ...] = ("before", "after", "oracle")
BASE = "base"
SWAPS = 50


class Text(msgspec.Struct, frozen=True):
    prompt: str
    completion: str


class Person(msgspec.Struct, frozen=True):
    """One user of the device.

    Attributes:
        url: of the service, which has a server LLM too.
        examples: what the user customizes with.
        queries: to judge it by.
        mixed: prompts that the server LLM may be asked too.
        oracle: an adapter bundle, to compare with.
    """

    url: str
    examples: list[Text]
    queries: list[Text]
    mixed: list[str]
    oracle: str


class Job(msgspec.Struct, frozen=True):
    """What is on the device.

    Attributes:
        keys: keys.json, whose signatures are trusted.
        folder: where each user's adapter is kept.
        people: by name.
        shared_prompt: said with everybody's adapter, one after the other.
    """

    bundle: str
    keys: str
    folder: str
    threads: int | None
    people: dict[str, Person]
    shared_prompt: str


class Run(msgspec.Struct):
    """One model on the queries of one user; log-loss in nats per token."""

    answers: list[str]
    log_loss: float


class Routed(msgspec.Struct):
    """An answer that may be the server LLM's: of `crayon_runtime.routing.Answer` what JSON can hold.

    Attributes:
        draft: what the device says, whether or not it was shown.
        score: None if there was no usable signal.
    """

    text: str
    draft: str
    route: Route
    reason: str
    fallback: bool
    policy: str
    score: float | None
    threshold: float
    device_tokens: int
    server_tokens: int
    sent_bytes: int
    seconds: dict[str, float]


class Customized(msgspec.Struct):
    """What came of one customization, and how long its parts took.

    Attributes:
        point: the mean query of the examples in the space of the indicators, of unit length.
        examples_log_loss: of the examples, before and after.
        seconds: by part, in the order in which they happen.
        total_seconds: from the examples to the customized model.
    """

    installed: bool
    reason: str
    alpha: list[float]
    point: list[float]
    examples_log_loss: tuple[float, float]
    seconds: dict[str, float]
    total_seconds: float
    runs: dict[Model, Run]
    routed: list[Routed]


class Measurements(msgspec.Struct):
    people: dict[str, Customized]
    live: dict[str, str]
    """What the base and everybody's adapter answer to the shared prompt, swapped between the requests."""
    running_answer_kept: bool
    """Whether an answer stayed the same when the adapter was swapped in its middle."""
    load_seconds: float
    swap_ms: float
    """Between adapters that were read before: median."""
    first_token_ms: float
    """From the request to the first token: median over the requests of the base."""
    base_tokens_per_second: float
    adapter_tokens_per_second: float
    peak_rss_bytes: int
    torch_loaded: bool


def measure(job: Job) -> Measurements:
    """Customize for everybody, then answer everything: the models take turns at every query."""
    started = time.perf_counter()
    with Engine.load(Path(job.bundle), backend="onnx", threads=job.threads) as engine:
        load_seconds = time.perf_counter() - started
        people = {name: _customize(engine, job, name, person) for name, person in job.people.items()}
        adapters = {name: _adapter(job, name, customized) for name, customized in people.items()}

        live = {}
        for name, adapter in {BASE: None, **adapters}.items():
            engine.set_adapter(adapter)
            live[name] = engine.generate(job.shared_prompt, max_new_tokens=MAX_NEW_TOKENS).text
        first, second, *_ = adapters
        interrupted = _swap_while_answering(engine, job.shared_prompt, adapters[first], adapters[second])

        speeds = {model: _Speed() for model in MODELS}
        models = {name: _models(adapters[name], Bundle.open(person.oracle)) for name, person in job.people.items()}
        for name, person in job.people.items():
            for text, model in itertools.product(person.queries, MODELS):
                engine.set_adapter(models[name][model])
                generation = engine.generate(text.prompt, max_new_tokens=MAX_NEW_TOKENS)
                people[name].runs[model].answers.append(generation.text)
                speeds[model].add(generation)
        for name, person in job.people.items():
            people[name].routed = _ask(engine, adapters[name], Path(job.folder, name), person)
        swaps = [_swap_ms(engine, list(adapters.values())[i % len(adapters)]) for i in range(SWAPS)]
        peak_rss_bytes = peak_memory()
        for name, person in job.people.items():
            for model, adapter in models[name].items():
                read = engine.read_adapter(adapter) if adapter else None
                people[name].runs[model].log_loss = answer_log_loss(engine, _pairs(person.queries), read)
    return Measurements(
        people=people,
        live=live,
        running_answer_kept=interrupted == live[first],
        load_seconds=load_seconds,
        swap_ms=median(swaps),
        first_token_ms=median(speeds["before"].first_token_seconds) * 1e3,
        base_tokens_per_second=speeds["before"].tokens_per_second,
        adapter_tokens_per_second=speeds["after"].tokens_per_second,
        peak_rss_bytes=peak_rss_bytes,
        torch_loaded="torch" in sys.modules,
    )


def _customize(engine: Engine, job: Job, name: str, person: Person) -> Customized:
    """Over the network: alpha goes up, an adapter comes down."""
    trusted = TrustedKeys.read(job.keys)
    started = time.perf_counter()
    with PoolClient(person.url, trusted=trusted) as service:
        done = customize(engine, _pairs(person.examples), service, folder=Path(job.folder, name))
        total_seconds = time.perf_counter() - started
        point = _point(engine, person.examples, service)
    return Customized(
        installed=done.installed,
        reason=done.reason,
        alpha=done.alpha,
        point=point,
        examples_log_loss=(done.log_loss_before, done.log_loss),
        seconds=done.seconds,
        total_seconds=total_seconds,
        runs={model: Run([], 0.0) for model in MODELS},
        routed=[],
    )


def _ask(engine: Engine, adapter: Bundle | None, folder: Path, person: Person) -> list[Routed]:
    """Everything of the mixed queries, with the policy that a device has right after it was customized."""
    engine.set_adapter(adapter)
    with ServerLLM(person.url) as server:
        router = Router(engine, server=server, log=SentLog(sent_log_path(folder)), folder=folder)
        return [_routed(router.answer(prompt, max_new_tokens=MAX_NEW_TOKENS)) for prompt in person.mixed]


def _routed(answer: Answer) -> Routed:
    return Routed(
        text=answer.text,
        draft=answer.generation.text if answer.generation else "",
        route=answer.route,
        reason=answer.reason,
        fallback=answer.fallback,
        policy=answer.policy,
        score=answer.score if math.isfinite(answer.score) else None,
        threshold=answer.threshold,
        device_tokens=answer.generation.generated_tokens if answer.generation else 0,
        server_tokens=answer.server_tokens,
        sent_bytes=answer.sent_bytes,
        seconds=answer.seconds,
    )


def _point(engine: Engine, examples: list[Text], service: PoolClient) -> list[float]:
    """Where the examples lie among the indicators; only the report's map needs it."""
    projection, embedding, pairs = service.projection, service.manifest.embedding, _pairs(examples)
    prompts = engine.embed(pairs, part="prompt", base=True) if embedding.residual else None
    query = projection.query(prompts, engine.embed(pairs, part=embedding.part, base=True)).mean(0)
    z = (query - projection.mean) @ projection.projection
    point: list[float] = (z / np.linalg.norm(z)).tolist()
    return point


def _adapter(job: Job, name: str, customized: Customized) -> Bundle | None:
    """What the user's requests are answered with from now on."""
    return Bundle.open(Path(job.folder, name, ADAPTER)) if customized.installed else None


def _models(customized: Bundle | None, oracle: Bundle) -> dict[Model, Bundle | None]:
    return {"before": None, "after": customized, "oracle": oracle}


def _pairs(texts: list[Text]) -> list[tuple[str, str]]:
    return [(text.prompt, text.completion) for text in texts]


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
        return self.tokens / self.seconds if self.seconds else 0.0


def _swap_ms(engine: Engine, adapter: Bundle | None) -> float:
    started = time.perf_counter()
    engine.set_adapter(adapter)
    return (time.perf_counter() - started) * 1e3


def _swap_while_answering(engine: Engine, prompt: str, first: Bundle | None, second: Bundle | None) -> str:
    """The answer of `first`, although `second` is set after its third token."""
    engine.set_adapter(first)
    with engine.stream(prompt, max_new_tokens=MAX_NEW_TOKENS) as stream:
        pieces = [piece.text for piece in itertools.islice(stream, 3)]
        engine.set_adapter(second)
        pieces += [piece.text for piece in stream]
    return "".join(pieces)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
