"""When should the device ask the server? Every signal and policy on the phone-assistant users, and what it costs to be right.

    device           the embedded model in int4 on `crayon_runtime`, customized for each user from a pool of ten examples
    server           the embedded server model in float: it gets the query's text alone, so it cannot know the user's convention
    oracle_server    the same with the user's examples in its prompt; no server gets these, so it is shown as a bound alone

Each user asks 20 queries of what the device is customized for, 10 of other domains that it knows, and 10 that only the server knows.
A score says how good the device's answer is. The rows:

    random, oracle             any order; the order of those who know both answers
    always_small, always_large the device alone, the server alone
    log_probability and all other signals of `crayon_runtime.routing.signals`, each as a score
    paper, confidence          these policies, with a threshold for the budget
    calibrated, early          fitted on other users whose answers are judged
    without_labels             as calibrated, on the same users, but unjudged
    uncalibrated               from the user's own ten examples alone: what a device has right after it was customized

Right is measured in two ways: `exact`, the call in the user's convention, and `useful`, the right call in any convention. As
`oracle_server`, exact once more, against that server.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from crayon_runtime.errors import InvalidInput
from crayon_server import models, training
from crayon_server.data.phone_assistant import benchmark
from crayon_server.evaluate.customization import Customization, Device
from crayon_server.evaluate.customization.rows import few_shot_texts
from crayon_server.evaluate.float_model import FloatModel
from crayon_server.evaluate.routing.answers import (
    Judged,
    Recorded,
    asking,
    judge,
    record,
    said_by,
    with_prototypes,
)
from crayon_server.evaluate.routing.rows import BUDGET, Row, Seed, asked, report
from crayon_server.pool.build import Settings, typical_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crayon_server.data.phone_assistant import User

__all__ = ["Row", "run"]


def run(
    users: Literal["validation", "test"],
    seeds: Sequence[int],
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    server_dir: Path | None = None,
    limit: int | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """All rows, as one JSON object.

    Args:
        users: who are reported. Policies are fitted on the validation users; where these are reported, on every second of them, and the
            others are reported.
        seeds: of the pools' training; the users and their queries are always those of the frozen benchmark.
        settings: of the pools.
        say: told how far it is.
        server_dir: of the server model, a Hugging Face folder; None: the embedded one.
        limit: how many users are reported, and policies fitted on; None: all.
        jobs: how many seeds to measure at the same time, each in a process of its own.

    Returns:
        "rows": {measure: {name: `Row`}}; "accuracy": {who answers: {measure: {part: share}}}; "differences": how much larger the AUROC
        of `calibrated` is than that of `log_probability`; "early": {measure: what deciding after some tokens costs and saves};
        "curves": {measure: accuracy by the share of calls}; "device_tokens", mean of an answer; "budget", "users", "seeds", "settings".

    Raises:
        InvalidInput: there are no seeds, or one comes twice; or the limit is below 1.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InvalidInput("seeds must be different integers, at least one", where="seeds")
    if limit is not None and limit < 1:
        raise InvalidInput(f"the limit is {limit}; it must be 1 or more", where="limit")
    settings, server_dir = settings or Settings(), server_dir or models.load_nano_server()
    fitted, reported = _users(users, limit)
    server = FloatModel(server_dir)
    with training.threads(settings.threads):
        say("server: answers")
        by_server = _judged(server, reported)
        say("oracle_server: answers")
        by_oracle = _judged(server, reported, few_shot=True)
    everybody = (*fitted, *reported)
    if jobs == 1:
        with _bench(everybody, settings) as (bench, device):
            recorded = [_measure(bench, device, server, seed, say) for seed in seeds]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
            running = [processes.submit(_seed, everybody, settings, server_dir, seed) for seed in seeds]
            recorded = [_said(say, seed, done.result()) for seed, done in zip(seeds, running, strict=True)]
    count = sum(len(user.queries) for user in fitted)
    of_seeds = [Seed(_part(all_, slice(count)), _part(all_, slice(count, None))) for all_ in recorded]
    return report(of_seeds, by_server, by_oracle, asked(reported)) | {
        "device_tokens": float(np.mean([seed.reported.tokens.mean() for seed in of_seeds])),
        "budget": BUDGET,
        "users": {"split": users, "reported": len(reported), "fitted": len(fitted)},
        "seeds": list(seeds),
        "settings": msgspec.to_builtins(settings),
    }


def _users(split: Literal["validation", "test"], limit: int | None) -> tuple[tuple[User, ...], tuple[User, ...]]:
    """Whom policies are fitted on, and who are reported. Some of both conventions that training has and has not, as they are ordered."""
    bench = benchmark()
    fitted, reported = (
        (bench.validation, bench.test) if split == "test" else (bench.validation[::2], bench.validation[1::2])
    )
    return tuple(map(asking, _spread(fitted, limit))), tuple(map(asking, _spread(reported, limit)))


def _spread(users: Sequence[User], limit: int | None) -> list[User]:
    """At most so many, evenly from first to last."""
    count = len(users) if limit is None else min(limit, len(users))
    return [users[i * len(users) // count] for i in range(count)]


def _judged(server: FloatModel, users: Sequence[User], *, few_shot: bool = False) -> Judged:
    queries = [query for user in users for query in user.queries]
    texts = few_shot_texts(server, users) if few_shot else server.tokenize(queries)
    return judge(said_by(server, queries, texts), queries)


@contextmanager
def _bench(users: Sequence[User], settings: Settings) -> Iterator[tuple[Customization, Device]]:
    bench = Customization(users, settings)
    with (
        tempfile.TemporaryDirectory(prefix="crayon-") as scratch,
        Device(Path(scratch), users, bench.query_texts, settings) as device,
    ):
        yield bench, device


def _measure(
    bench: Customization, device: Device, server: FloatModel, seed: int, say: Callable[[str], None] = lambda _: None
) -> Recorded:
    """Train a pool, have the server answer its typical inputs, and ask the customized devices everything."""
    say(f"seed {seed}  pool")
    with bench.pool("groups", replace(bench.settings, seed=seed)) as pool:
        typical = typical_texts(pool.located, bench.sources)
        kept = device.write_pool("routing", pool.located, pool.loras, typical)
    with training.threads(bench.settings.threads):
        kept = with_prototypes(device, kept, server)
    return _said(say, seed, record(device, kept))


def _seed(users: Sequence[User], settings: Settings, server_dir: Path, seed: int) -> Recorded:
    """One seed, in a process of its own."""
    from crayon_server.cli import quiet

    with quiet(), _bench(users, settings) as (bench, device):
        return _measure(bench, device, FloatModel(server_dir), seed)


def _said(say: Callable[[str], None], seed: int, recorded: Recorded) -> Recorded:
    exact, useful = recorded.judged
    say(f"seed {seed}  device: exact {exact.mean():.3f}, useful {useful.mean():.3f}")
    return recorded


def _part(recorded: Recorded, rows: slice) -> Recorded:
    """Some of the queries."""
    exact, useful = recorded.judged
    return Recorded(
        Judged(exact[rows], useful[rows]),
        recorded.tokens[rows],
        recorded.signals[rows],
        {after: signals[rows] for after, signals in recorded.early.items()},
        recorded.uncalibrated[rows],
    )
