"""What the demo reports: measured numbers and what was said, as report.json has them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from crayon_runtime.cli.common import size_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from crayon_runtime.routing.policies import Route
    from crayon_server.demo.device import Model

Measure = Literal["useful", "exact"]
QueryPart = Literal["in_task", "other_domain", "server_only"]

KIND = "crayon demo"
"""What report.json says that it is."""
MEASURES: tuple[Measure, ...] = ("useful", "exact")
"""The right call in any convention; and in the user's."""
PARTS: tuple[QueryPart, ...] = ("in_task", "other_domain", "server_only")
"""What is asked: what the device is customized for, other domains that it knows, and domains that only the server LLM knows."""
CHAT = "/v1/chat/completions"


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
class Judged:
    """Whether an answer is right, by `MEASURES`."""

    exact: bool
    useful: bool


@dataclass(frozen=True)
class Asked:
    """A query to the customized device, which may ask the server LLM.

    Attributes:
        route, reason, fallback, score, threshold: of the answer, as `crayon_runtime.routing.Answer` has them; the score is None if there
            was no usable signal.
        text: what was shown.
        draft: what the device says.
        by_server: what the server LLM says; if the device did not ask it, the demo has, for the curve.
        shown_is, draft_is, by_server_is: how good these three are.
        sent_bytes: that left the device for it: of the body of the request.
        seconds: "device", "score", "server" and "total".
    """

    part: QueryPart
    prompt: str
    wanted: str
    route: Route
    reason: str
    fallback: bool
    score: float | None
    threshold: float
    text: str
    draft: str
    by_server: str
    shown_is: Judged
    draft_is: Judged
    by_server_is: Judged
    device_tokens: int
    server_tokens: int
    sent_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """What calls to the server LLM buy; all are shares of the queries. Between two points both go in a straight line.

    Attributes:
        calls, accuracy: of the policy, from no calls to nothing but calls.
        oracle_calls, oracle_accuracy: of who knows both answers.
        policy_calls, policy_accuracy: of the policy as it is.
        apgr: of the gap between device and server LLM the share that is recovered, mean over all shares of calls: random routing has 0.5.
            None if the server LLM is not better.
    """

    calls: list[float]
    accuracy: list[float]
    oracle_calls: list[float]
    oracle_accuracy: list[float]
    policy_calls: float
    policy_accuracy: float
    apgr: float | None

    @property
    def device(self) -> float:
        """Without any call."""
        return self.accuracy[0]

    @property
    def server(self) -> float:
        """With nothing but calls."""
        return self.accuracy[-1]


@dataclass(frozen=True)
class Routing:
    """Hybrid inference, over all users.

    Attributes:
        policy: its name.
        server: the name of the server LLM.
        server_parameters: of it.
        score_us: what signals and decision take: median, microseconds.
        score_share: of the time that the device takes to answer, by medians.
        server_ms: until the server LLM has answered: median.
    """

    policy: str
    server: str
    server_parameters: int
    prototypes: int
    curves: dict[Measure, Curve]
    score_us: float
    score_share: float
    server_ms: float


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
        asked: the queries of `PARTS`, in this order.
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
    asked: tuple[Asked, ...]
    messages: tuple[Message, ...]

    @property
    def customizing(self) -> tuple[Message, ...]:
        """What customizing needed."""
        return tuple(message for message in self.messages if CHAT not in message.request_head)

    @property
    def order(self) -> Message:
        """The request that alpha was sent with, and the adapter that came for it."""
        return next(message for message in self.customizing if message.request_body)

    @property
    def examples_sent(self) -> int:
        """How many of the examples are found in anything that was sent, as they are or as JSON writes them."""
        sent = "".join(message.request_head + message.request_body for message in self.messages)
        return sum(any(json.dumps(text)[1:-1] in sent or text in sent for text in example) for example in self.examples)

    @property
    def chat(self) -> tuple[Message, ...]:
        """The queries that went to the server LLM, and its answers."""
        return tuple(message for message in self.messages if CHAT in message.request_head)


def bytes_up(messages: tuple[Message, ...]) -> int:
    """That left the device, headers included."""
    return sum(sum(message.request_bytes) for message in messages)


def bytes_down(messages: tuple[Message, ...]) -> int:
    return sum(sum(message.response_bytes) for message in messages)


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
class BackendFacts:
    """The base in one backend: sizes in bytes; times are medians, each in processes of its own.

    Attributes:
        name, title: as options name it, and as people do.
        load_seconds: from nothing to the first token.
        peak_rss_bytes: of a process that loads and answers.
        mean_kl: of its weights from the float ones on the golden cases, in nats.
        golden_passed: of `golden_cases` cases, which are the backend's own: how many it answers as it must.
        golden_error, golden_tolerance: the largest error of a case's scores, and what is allowed.
    """

    name: str
    title: str
    bundle_bytes: int
    weights_bytes: int
    load_seconds: float
    peak_rss_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    mean_kl: float
    golden_cases: int
    golden_passed: int
    golden_error: float
    golden_tolerance: float
    torch_loaded: bool


@dataclass(frozen=True)
class Agreement:
    """How far two backends, whose weights are rounded by different rules, say the same.

    Attributes:
        answers, same_answers: greedy answers, and how many are the same in all their tokens.
        tokens: that both have scored, given the same text before them.
        same_best_token: the share of these for which both hold the same token for the most likely one.
        mean_kl: KL(the first || the second), in nats, mean over the tokens.
    """

    answers: int
    same_answers: int
    tokens: int
    same_best_token: float
    mean_kl: float


@dataclass(frozen=True)
class InExecutorch:
    """A user's customization, once more in ExecuTorch.

    Attributes:
        adapter_bytes: of the adapter that the service made for the program's slots.
        total_seconds: from the examples to the customized model.
        exact_match: on the user's queries.
    """

    name: str
    installed: bool
    adapter_bytes: int
    total_seconds: float
    exact_match: float
    torch_loaded: bool


@dataclass(frozen=True)
class Comparison:
    """Both backends side by side.

    Attributes:
        customized: what everybody's customized model does in ExecuTorch.
        prefill_tokens, decode_tokens: whose time was taken, `repetitions` times in each of `processes` processes of each backend.
    """

    backends: list[BackendFacts]
    agreement: Agreement
    prefill_tokens: int
    decode_tokens: int
    processes: int
    repetitions: int
    customized: list[InExecutorch] = field(default_factory=list)

    def to_text(self) -> str:
        """A table in a few lines."""
        agreed = self.agreement
        rows: list[tuple[str, Callable[[BackendFacts], str]]] = [
            ("weights, bundle", lambda b: f"{size_text(b.weights_bytes)}, {size_text(b.bundle_bytes)}"),
            ("load", lambda b: f"{b.load_seconds * 1e3:.0f} ms"),
            ("memory of the process", lambda b: size_text(b.peak_rss_bytes)),
            (f"prefill, {self.prefill_tokens} tokens", lambda b: f"{b.prefill_tokens_per_second:.0f} tokens/s"),
            (f"decode, {self.decode_tokens} tokens", lambda b: f"{b.decode_tokens_per_second:.0f} tokens/s"),
            ("golden cases", lambda b: f"{b.golden_passed} of {b.golden_cases}"),
            ("KL from the float model", lambda b: f"{b.mean_kl:.3f}"),
        ]
        lines = [f"{'the same model in both backends':<36}" + "".join(f"{b.title:>20}" for b in self.backends)]
        lines += [f"{what:<36}" + "".join(f"{cell(b):>20}" for b in self.backends) for what, cell in rows]
        lines.append(
            f"the same answer to {agreed.same_answers} of {agreed.answers} prompts, the same best token at {agreed.same_best_token:.1%} of "
            f"{agreed.tokens}, KL {agreed.mean_kl:.3f}: each rounds the weights in its own way"
        )
        if self.customized:
            matches = ", ".join(f"{one.name} {one.exact_match:.0%}" for one in self.customized)
            size = size_text(max(one.adapter_bytes for one in self.customized))
            lines.append(f"customized in ExecuTorch, with adapters of {size} from the service: exact match {matches}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DemoReport:
    """All that the page shows.

    Attributes:
        queries: of each user.
        parameters: of the base.
        float_bytes, bundle_bytes, weights_bytes: the base as safetensors, its int4 bundle, and the weights in that.
        mean_kl: of the int4 model from the float one on the golden cases, in nats.
        device: `Measurements` without the people.
        routing: of the queries that the server LLM could be asked.
        comparison: of the backends; None where `not_compared` says what is missing for that.
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
    routing: Routing
    comparison: Comparison | None
    not_compared: str | None
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
        up, down = person.order.request_bytes[1], person.order.response_bytes[1]
        asked = [query for person in self.people for query in person.asked]
        beyond = sum(query.part != "in_task" for query in asked)
        useful, chat = self.routing.curves["useful"], [message for person in self.people for message in person.chat]
        lines += [
            "",
            f"useful answers to {len(asked)} queries, {beyond} of them beyond what the device is customized for:",
            f"{useful.device:.0%} by the device, {useful.server:.0%} by the server LLM, {useful.policy_accuracy:.0%} by both, "
            f"with {useful.policy_calls:.0%} of the queries sent: {size_text(sum(message.request_bytes[1] for message in chat))}",
            "",
            f"sent for {person.name}: {size_text(up)}, with no word of the examples; came back: an adapter of {size_text(down)}",
            f"ten examples to customized model: {self.customizing_seconds:.2f} s; swap: {self.device['swap_ms'] * 1e3:.0f} µs; "
            f"{self.device['base_tokens_per_second']:.0f} tokens/s, {self.device['adapter_tokens_per_second']:.0f} with an adapter",
            f"{self.parameters:,} parameters on a generated benchmark; three users are no benchmark: "
            "see `crayon bench customization`",
            "",
            self.comparison.to_text() if self.comparison else f"backends not compared: {self.not_compared}",
        ]
        return "\n".join(lines)


def pool_has(person: Person) -> str:
    """Whether the pool was trained on the person's convention, in words."""
    return f"convention seen in {person.sources} users" if person.sources else "convention never seen"
