"""The benchmark's users: whom a pool is trained on, whom settings are chosen on, and whom results are reported on.

A user has three domains and one convention. 18 conventions occur in training, skewed as in the trial that the sizes come from
(most users write canonical calls in English); 9 never do. Half of the validation and of the test users have one of those 9.
The domain triples of the three splits are disjoint. A nano model knows all domains and conventions, but not which user speaks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from crayon_server.data.phone_assistant import world
from crayon_server.data.phone_assistant.conventions import (
    CONVENTIONS,
    LOCALES,
    NAMINGS,
    STYLES,
    Convention,
    Piece,
    write,
)
from crayon_server.data.phone_assistant.draws import Draws

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

SEPARATOR = "\n"
"""Ends every prompt; what follows is the completion. It occurs nowhere else."""

SplitName = Literal["train", "validation", "test"]
SOURCES, TEXTS_PER_SOURCE = 192, 32
HELD_OUT_USERS, EXAMPLES, QUERIES, OTHER_QUERIES = 36, 10, 40, 20
SEEN_CONVENTIONS = 18

_STYLE_WEIGHTS = dict(zip(STYLES, (0.6, 0.25, 0.15), strict=True))
_NAMING_WEIGHTS = dict(zip(NAMINGS, (0.6, 0.25, 0.15), strict=True))
_LOCALE_WEIGHTS = dict(zip(LOCALES, (0.5, 0.25, 0.25), strict=True))


@dataclass(frozen=True)
class Example:
    """One request and the call that answers it.

    Attributes:
        prompt: what is said, ending in `SEPARATOR`.
        domain: of the request, as "alarm".
        function: canonical name, as "alarm.set".
        convention: that the completion is written in.
        pieces: the completion in stretches of structure, function name, keys and values.
    """

    prompt: str
    domain: str
    function: str
    convention: Convention
    pieces: tuple[Piece, ...]

    @property
    def completion(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def text(self) -> str:
        return self.prompt + self.completion


@dataclass(frozen=True)
class User:
    """One person: what a pool's source or a customized device sees of them.

    Attributes:
        name: unique in the benchmark, as "test-07".
        seen: whether training sources have this convention too.
        examples: what the device owns (32 for a training source, else 10).
        queries: of the user's domains, none with the answer of an example. Empty for training sources, as are the next two.
        out_of_task: queries of other domains that the device knows.
        server_only: queries of domains that only a server knows.
    """

    name: str
    split: SplitName
    convention: Convention
    domains: tuple[str, str, str]
    seen: bool
    examples: tuple[Example, ...]
    queries: tuple[Example, ...]
    out_of_task: tuple[Example, ...]
    server_only: tuple[Example, ...]


@dataclass(frozen=True)
class Benchmark:
    """A world's users, and the conventions that training has and has not."""

    seed: int
    seen: tuple[Convention, ...]
    unseen: tuple[Convention, ...]
    train: tuple[User, ...]
    validation: tuple[User, ...]
    test: tuple[User, ...]


def example(draws: Draws, domain: str, convention: Convention) -> Example:
    request = world.utter(draws, domain, convention.locale)
    pieces = write(request.function, request.arguments, convention)
    return Example(request.words + SEPARATOR, domain, request.function, convention, pieces)


def stream(
    seed: str | int, *, domains: Sequence[str] = world.DOMAINS, conventions: Sequence[Convention] = CONVENTIONS
) -> Iterator[Example]:
    """Requests without end, uniform over domains and conventions: the world as a base model is trained on it."""
    draws = Draws("stream", seed)
    while True:
        yield example(draws, draws.choice(domains), draws.choice(conventions))


@functools.cache
def benchmark(seed: int = 0) -> Benchmark:
    """The users of one world. Seed 0 is the frozen benchmark that results are reported on; its hashes are tested."""
    seen, unseen = _split_conventions(Draws("conventions", seed))
    triples = Draws("triples", seed).shuffled(list(itertools.combinations(world.DOMAINS, 3)))
    test, validation, train = (
        triples[:HELD_OUT_USERS],
        triples[HELD_OUT_USERS : 2 * HELD_OUT_USERS],
        triples[2 * HELD_OUT_USERS :],
    )
    return Benchmark(
        seed,
        seen,
        unseen,
        tuple(_source(seed, i, train, seen) for i in range(SOURCES)),
        tuple(_held_out(seed, "validation", i, validation[i], seen, unseen) for i in range(HELD_OUT_USERS)),
        tuple(_held_out(seed, "test", i, test[i], seen, unseen) for i in range(HELD_OUT_USERS)),
    )


def more_examples(user: User, count: int, seed: int = 0) -> tuple[Example, ...]:
    """`count` further examples of the user's task, none with the answer of one of their queries: to tune a LoRA for them alone."""
    draws = Draws("more", seed, user.name, str(user.convention))
    asked = {query.completion for query in user.queries}
    return _round_robin(draws, user.domains, user.convention, count, lambda e: e.completion not in asked)


def _split_conventions(draws: Draws) -> tuple[tuple[Convention, ...], tuple[Convention, ...]]:
    """18 conventions for training, the canonical English call among them, and 9 others that have every factor twice or more."""
    _, *others = CONVENTIONS  # the first is the canonical English call
    while True:
        order = draws.shuffled(others)
        unseen = order[SEEN_CONVENTIONS - 1 :]
        values = [value for c in unseen for value in (c.style, c.naming, c.locale)]
        if all(values.count(value) >= 2 for value in (*STYLES, *NAMINGS, *LOCALES)):
            return tuple(c for c in CONVENTIONS if c not in unseen), tuple(c for c in CONVENTIONS if c in unseen)


def _weights(conventions: Iterable[Convention]) -> list[float]:
    """The world's skew: canonical calls in English are the most common."""
    return [_STYLE_WEIGHTS[c.style] * _NAMING_WEIGHTS[c.naming] * _LOCALE_WEIGHTS[c.locale] for c in conventions]


def _source(seed: int, i: int, triples: Sequence[tuple[str, ...]], seen: Sequence[Convention]) -> User:
    draws = Draws("users", seed, "train", i)
    convention = draws.weighted(seen, _weights(seen))
    first, second, third = draws.shuffled(triples[i] if i < len(triples) else draws.choice(triples))
    domains = (first, second, third)
    examples = _round_robin(draws, domains, convention, TEXTS_PER_SOURCE)
    return User(f"train-{i:03d}", "train", convention, domains, True, examples, (), (), ())


def _held_out(
    seed: int,
    split: SplitName,
    i: int,
    triple: tuple[str, ...],
    seen: Sequence[Convention],
    unseen: Sequence[Convention],
) -> User:
    draws = Draws("users", seed, split, i)
    is_seen = i >= HELD_OUT_USERS // 2
    conventions = seen if is_seen else unseen
    convention = draws.weighted(conventions, _weights(conventions))
    first, second, third = draws.shuffled(triple)
    domains = (first, second, third)
    examples = _round_robin(draws, domains, convention, EXAMPLES)
    known = {e.completion for e in examples}
    queries = _round_robin(draws, domains, convention, QUERIES, lambda e: e.completion not in known)
    others = [domain for domain in world.DOMAINS if domain not in domains]
    out_of_task = tuple(example(draws, draws.choice(others), convention) for _ in range(OTHER_QUERIES))
    server_only = tuple(example(draws, draws.choice(world.SERVER_ONLY), convention) for _ in range(OTHER_QUERIES))
    return User(f"{split}-{i:02d}", split, convention, domains, is_seen, examples, queries, out_of_task, server_only)


def _round_robin(
    draws: Draws,
    domains: Sequence[str],
    convention: Convention,
    count: int,
    wanted: Callable[[Example], bool] = lambda _: True,
) -> tuple[Example, ...]:
    """`count` examples, the domains in turn."""
    examples: list[Example] = []
    while len(examples) < count:
        candidate = example(draws, domains[len(examples) % len(domains)], convention)
        if wanted(candidate):
            examples.append(candidate)
    return tuple(examples)


def digest(users: Iterable[User]) -> str:
    """SHA-256 over everything that the users say, answer and are: what freezes a split."""
    sha = hashlib.sha256()
    for user in users:
        sha.update(json.dumps([user.name, str(user.convention), user.domains, user.seen]).encode())
        for part in (user.examples, user.queries, user.out_of_task, user.server_only):
            sha.update(json.dumps([[e.prompt, e.completion, e.domain, e.function] for e in part]).encode())
    return sha.hexdigest()


def write_jsonl(examples: Iterable[Example], path: Path) -> None:
    """One JSON object {"prompt": …, "completion": …} a line."""
    lines = (json.dumps({"prompt": e.prompt, "completion": e.completion}, ensure_ascii=False) for e in examples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
