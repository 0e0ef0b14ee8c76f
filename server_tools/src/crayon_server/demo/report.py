"""What the demo reports: measured numbers and what was said, as report.json has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from crayon_runtime.cli.common import size_text

if TYPE_CHECKING:
    from crayon_server.demo.device import Model

KIND = "crayon demo"
"""What report.json says that it is."""


@dataclass(frozen=True)
class Score:
    """One model on one user's queries: shares from 0 to 1, log-loss in nats per token."""

    exact_match: float
    intent: float
    log_loss: float


@dataclass(frozen=True)
class Line:
    """A query, what is wanted, and what is answered before and after."""

    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class Message:
    """One request and its answer, as a relay between device and service saw them.

    Attributes:
        request_head, request_body, response_head: as they stood on the wire.
        request_bytes, response_bytes: of head and body.
        first_byte_ms, last_byte_ms: of the answer, after the first byte of the request.
        service_ms: what the service says that it took, from the first byte to the last.
    """

    request_head: str
    request_body: str
    request_bytes: tuple[int, int]
    response_head: str
    response_bytes: tuple[int, int]
    first_byte_ms: float
    last_byte_ms: float
    service_ms: float


@dataclass(frozen=True)
class Person:
    """Who a user of the demo is, and what came of their customization.

    Attributes:
        user: their name in the benchmark.
        sources: how many of the users that the pool was trained on have the same convention.
        examples: what the customization was made of; prompt and answer.
        scores: "before" and "after" the customization, and with a LoRA that was trained on the user's whole task ("oracle").
        alpha: what left the device.
        point: the mean query of the examples, in the space of the indicators.
        installed, reason: whether the adapter proved itself, and what was said of that.
        examples_log_loss: of the examples before and after.
        seconds: what customizing took, by part, and all in all.
        lines: the first query of each of their domains.
        shared: what everybody is told, with the adapters swapped in between.
        messages: everything that went between device and service, in order.
    """

    name: str
    user: str
    convention: str
    sources: int
    domains: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    scores: dict[Model, Score]
    alpha: list[float]
    point: list[float]
    installed: bool
    reason: str
    examples_log_loss: tuple[float, float]
    seconds: dict[str, float]
    total_seconds: float
    lines: tuple[Line, ...]
    shared: Line
    messages: tuple[Message, ...]

    @property
    def asked(self) -> Message:
        """The request that alpha was sent with, and the adapter that came for it."""
        return next(message for message in self.messages if message.request_body)

    @property
    def bytes_up(self) -> int:
        return sum(sum(message.request_bytes) for message in self.messages)

    @property
    def bytes_down(self) -> int:
        return sum(sum(message.response_bytes) for message in self.messages)


@dataclass(frozen=True)
class PoolFacts:
    """The pool that the demo built.

    Attributes:
        users, texts, conventions: of the data.
        typical: of each cluster the completion of its most typical text.
    """

    adapters: int
    rank: int
    steps: int
    users: int
    texts: int
    conventions: int
    bytes: int
    typical: list[str]


@dataclass(frozen=True)
class DemoReport:
    """All that the page shows.

    Attributes:
        queries: of each user.
        parameters: of the base.
        float_bytes, bundle_bytes, weights_bytes: the base as safetensors, its int4 bundle, and the weights in that.
        mean_kl: of the int4 model from the float one on the golden cases, in nats.
        device: `Measurements` without the people.
        stages: what was done, and the seconds of it.
    """

    people: list[Person]
    queries: int
    parameters: int
    float_bytes: int
    bundle_bytes: int
    weights_bytes: int
    mean_kl: float
    pool: PoolFacts
    device: dict[str, Any]
    stages: list[tuple[str, float]]
    seconds: float
    kind: str = KIND

    @property
    def customizing_seconds(self) -> float:
        """From ten examples to the customized model: median. The first user's includes what a process does only once."""
        return median(person.total_seconds for person in self.people)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """The result in a few lines."""
        lines = [f"{'exact match on ' + str(self.queries) + ' queries':<36}{'before':>8}{'after':>8}{'oracle':>8}"]
        for person in self.people:
            scores = person.scores
            cells = "".join(f"{scores[model].exact_match:>8.0%}" for model in ("before", "after", "oracle"))
            lines.append(f"{f'{person.name}, {pool_has(person)}':<36}{cells}")
        person = self.people[0]
        up, down = person.asked.request_bytes[1], person.asked.response_bytes[1]
        lines += [
            "",
            f"sent for {person.name}: {size_text(up)}, with no word of the examples; came back: an adapter of {size_text(down)}",
            f"ten examples to customized model: {self.customizing_seconds:.2f} s; swap: {self.device['swap_ms'] * 1e3:.0f} µs; "
            f"{self.device['base_tokens_per_second']:.0f} tokens/s, {self.device['adapter_tokens_per_second']:.0f} with an adapter",
            f"{self.parameters:,} parameters on a generated benchmark; three users are no benchmark: "
            "see `crayon bench customization`",
        ]
        return "\n".join(lines)


def pool_has(person: Person) -> str:
    """Whether the pool was trained on the person's convention, in words."""
    return f"convention seen in {person.sources} users" if person.sources else "convention never seen"
