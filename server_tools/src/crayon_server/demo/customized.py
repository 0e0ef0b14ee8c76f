"""The users' customizations once more, in ExecuTorch: pool, blend, `.ptd`, and the program that takes it; without torch.

Runs in a process of its own, as a device would. Reads a `Job` from stdin and writes a list of `Customized` to stdout, both JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from crayon_runtime.customize import ADAPTER, customize
from crayon_runtime.examples import answer_log_loss
from crayon_runtime.remote import PoolClient
from crayon_runtime.signing import TrustedKeys
from crayon_server.demo.device import Text
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS


class Person(msgspec.Struct, frozen=True):
    """One user of the device.

    Attributes:
        examples: what the user customizes with.
        queries: to judge it by.
    """

    examples: list[Text]
    queries: list[Text]


class Job(msgspec.Struct, frozen=True):
    """What is on the device.

    Attributes:
        bundle: whose program has slots for adapters.
        keys: keys.json, whose signatures are trusted.
        folder: where each user's adapter is kept.
        url: of the service.
        people: by name.
    """

    bundle: str
    keys: str
    folder: str
    url: str
    threads: int | None
    people: dict[str, Person]


class Customized(msgspec.Struct):
    """What came of one customization.

    Attributes:
        adapter_bytes: of what came down and is kept.
        total_seconds: from the examples to the customized model.
        answers: to the queries, with the adapter if it was installed.
        log_loss: of the right answers, nats per token.
    """

    name: str
    installed: bool
    reason: str
    adapter_bytes: int
    total_seconds: float
    answers: list[str]
    log_loss: float
    torch_loaded: bool


def measure(job: Job) -> list[Customized]:
    """Customize for everybody, then answer everything."""
    trusted = TrustedKeys.read(job.keys)
    with Engine.load(Path(job.bundle), backend="executorch", threads=job.threads) as engine:
        return [_measure(engine, job, trusted, name, person) for name, person in job.people.items()]


def _measure(engine: Engine, job: Job, trusted: TrustedKeys, name: str, person: Person) -> Customized:
    folder = Path(job.folder, name)
    started = time.perf_counter()
    engine.set_adapter(None)
    with PoolClient(job.url, trusted=trusted) as service:
        done = customize(engine, _pairs(person.examples), service, folder=folder)
    total_seconds = time.perf_counter() - started
    adapter = Bundle.open(folder / ADAPTER) if done.installed else None
    engine.set_adapter(adapter)
    answers = [engine.generate(text.prompt, max_new_tokens=MAX_NEW_TOKENS).text for text in person.queries]
    read = engine.read_adapter(adapter) if adapter else None
    return Customized(
        name,
        done.installed,
        done.reason,
        adapter.size if adapter else 0,
        total_seconds,
        answers,
        answer_log_loss(engine, _pairs(person.queries), read),
        "torch" in sys.modules,
    )


def _pairs(texts: list[Text]) -> list[tuple[str, str]]:
    return [(text.prompt, text.completion) for text in texts]


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
