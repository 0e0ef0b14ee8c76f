"""How much ten examples of a user customize the embedded model: a pool against one LoRA, and what lies between.

    base               the model as it is
    few_shot           the user's examples in the prompt of the same model, which was pre-trained on such conversations too
    single_lora        one LoRA of rank r for everybody, trained on all texts
    single_lora_nr     the same of rank N r: as many parameters as the pool has
    uniform            the pool of `crayon`, all weights 1/N: without the user's examples
    nearest            one LoRA per cluster, each trained on its own cluster; the user gets the nearest
    crayon             joint training, blended by alpha of the user's examples; the data says which texts belong together
    crayon_refined     the same pool; alpha is searched on the examples from there (`crayon_runtime.refine`)
    crayon_no_groups   joint training where the data does not say it: alpha from the task residual of each text
    crayon_paper       the paper's recipe, as far as it is public: PCA of the mean state over prompt and answer of each text
    tuned_on_10        a LoRA of the user's own, trained on the ten examples
    oracle             a LoRA of the user's own, trained on further texts of theirs: what no ten examples can reach

A row differs from another only in what its name says: all but `tuned_on_10` see as many training texts, in the same number of steps
(`oracle`: of the users themselves). Every user has 10 examples, and queries whose answers are not among them. The generated world is
small: the answer of a query may stand in texts of others, and the base was pre-trained on all of that world.

These rows are the float model. Others run on `crayon_runtime`: the base in int4, its alpha, and adapter bundles in float16 that are blended from a pool on disk:

    base_int4, crayon_int4, crayon_no_groups_int4
    crayon_int4_float_alpha    with the alpha of the float model
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from crayon_runtime.errors import InvalidInput
from crayon_server.data.phone_assistant import benchmark
from crayon_server.evaluate.customization.answers import Answers, Row, summary
from crayon_server.evaluate.customization.device import Device
from crayon_server.evaluate.customization.privacy import Disguised
from crayon_server.evaluate.customization.rows import Agreement, Customization, Measured, RowName
from crayon_server.pool.build import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crayon_server.evaluate.customization.rows import OnRow

__all__ = [
    "Agreement",
    "Answers",
    "Customization",
    "Device",
    "Disguised",
    "Measured",
    "Row",
    "run",
]


def run(
    users: Literal["validation", "test"],
    seeds: Sequence[int],
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    jobs: int = 1,
) -> dict[str, Any]:
    """All rows, as one JSON object.

    Args:
        users: choose settings on validation users only.
        seeds: of the training; the users and their texts are always those of the frozen benchmark.
        say: told every result when it is there; with several jobs, those of a seed at its end.
        jobs: how many seeds to measure at the same time, each in a process of its own.

    Returns:
        "rows": {name: `Row`}; "alpha": {pool: `Agreement`}, the mean and the least over the seeds; "privacy": [`Disguised`], means;
        "prompt_tokens": {"plain", "few_shot"}, means over the queries; "seeds", "users", "settings".

    Raises:
        InvalidInput: there are no seeds, or one comes twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InvalidInput("seeds must be different integers, at least one", where="seeds")
    bench = Customization(getattr(benchmark(), users), settings or Settings())
    with (
        tempfile.TemporaryDirectory(prefix="crayon-") as scratch,
        Device(Path(scratch), bench.users, bench.query_texts, bench.settings) as device,
    ):
        if jobs == 1:
            untrained = bench.untrained(device, _telling(say, ""))
            measured = [bench.measure(device, seed, _telling(say, f"seed {seed}  ")) for seed in seeds]
        else:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
                running = [processes.submit(_measure, users, seed, bench.settings) for seed in seeds]
                untrained = bench.untrained(device, _telling(say, ""))
                measured = [_told(say, seed, of_seed.result()) for seed, of_seed in zip(seeds, running, strict=True)]
    return {
        "rows": {name: asdict(row) for name, row in _rows(bench, untrained, measured).items()},
        "alpha": {name: _over_seeds(of_seeds.alpha[name] for of_seeds in measured) for name in measured[0].alpha},
        "privacy": [asdict(_mean(same)) for same in zip(*(of_seed.privacy for of_seed in measured), strict=True)],
        "prompt_tokens": {
            "plain": fmean(text.in_completion.index(True) for text in bench.query_texts),
            "few_shot": fmean(text.in_completion.index(True) for text in bench.few_shot_texts()),
        },
        "seeds": list(seeds),
        "users": users,
        "settings": msgspec.to_builtins(bench.settings),
    }


def _measure(users: Literal["validation", "test"], seed: int, settings: Settings) -> Measured:
    """One seed, in a process of its own."""
    from crayon_server.cli import quiet

    with quiet(), tempfile.TemporaryDirectory(prefix="crayon-") as scratch:
        bench = Customization(getattr(benchmark(), users), settings)
        with Device(Path(scratch), bench.users, bench.query_texts, settings) as device:
            return bench.measure(device, seed)


def _told(say: Callable[[str], None], seed: int, measured: Measured) -> Measured:
    for name, answers in measured.rows.items():
        _telling(say, f"seed {seed}  ")(name, answers)
    return measured


def _telling(say: Callable[[str], None], label: str) -> OnRow:
    return lambda name, answers: say(f"{label}{name}: exact match {answers.exact.mean():.3f}")


def _rows(bench: Customization, untrained: dict[RowName, Answers], measured: Sequence[Measured]) -> dict[RowName, Row]:
    answers: dict[RowName, list[Answers]] = defaultdict(list)
    for rows in (untrained, *(of_seed.rows for of_seed in measured)):
        for name, result in rows.items():
            answers[name].append(result)
    return {name: summary(bench.users, answers[name]) for name in get_args(RowName)}


def _over_seeds(agreements: Iterable[Agreement]) -> dict[str, float]:
    means, least = zip(*agreements, strict=True)
    return {"mean": fmean(means), "min": min(least)}


def _mean(same: Sequence[Disguised]) -> Disguised:
    first = same[0]
    return Disguised(first.noise, first.digits, fmean(d.em for d in same), fmean(d.recognized for d in same))
