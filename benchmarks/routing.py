"""Routing on the frozen test users, three seeds, and what a score costs: about six minutes on two quiet cores."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bundles
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Engine
from crayon_runtime.examples import ExampleStates
from crayon_runtime.prototypes import SIZE, Prototypes
from crayon_runtime.routing.policies import EARLY, WEIGHED, Policy
from crayon_runtime.routing.signals import Reference, signals
from crayon_server.cli import quiet
from crayon_server.data.phone_assistant import benchmark
from crayon_server.evaluate.routing import run as run_benchmark
from crayon_server.models import load_nano
from crayon_server.pool.build import Settings

SEEDS = (0, 1, 2)
OUT_OF_TASK = "prompts_nearness"
"""Chosen on the validation users."""


def run(work: Path) -> Iterator[Row]:
    yield _time_of_a_score("TinyLlama-1.1B shapes", bundles.tinyllama(work), users=2, reach=0.01)
    nano = export(load_nano(), work / "routing.bundle", quantize="int4", replace=True).bundle
    yield _time_of_a_score("nano, whose whole answer takes milliseconds", nano.path, users=20, reach=None)
    with quiet():
        result = run_benchmark(
            "test",
            SEEDS,
            Settings(threads=1),  # more get in each other's way at this size
            say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
            jobs=min(len(SEEDS), os.cpu_count() or 1),
        )
    (work / "routing.json").write_text(json.dumps(result, indent=1))
    rows = result["rows"]
    for measure in ("exact", "useful"):
        yield from _calibrated(measure, rows[measure], result["differences"][measure])
    found = {name: row["auroc_out_of_task"] for name, row in rows["exact"].items() if row["auroc_out_of_task"]}
    others = ("examples_nearness", "calibrated", "early", "log_probability")
    yield Row(
        f"AUROC of a query that is not of the user's task: {OUT_OF_TASK}",
        ">= .95",
        f"{_interval(found[OUT_OF_TASK])}; " + ", ".join(f"{name} {found[name]['mean']:.3f}" for name in others),
        found[OUT_OF_TASK]["mean"] >= 0.95,
    )
    yield from _early(result["early"]["useful"])
    for name in found:
        yield _worth(name, rows["exact"][name], rows["useful"][name])
    for measure, who in (("useful", ("device", "server")), ("exact", ("device", "server", "oracle_server"))):
        right = (f"{name} {result['accuracy'][name][measure]['all']:.3f}" for name in who)
        yield Row(f"right answers, {measure}", "", ", ".join(right))


def _time_of_a_score(what: str, bundle: Path, *, users: int, reach: float | None) -> Row:
    """Signals and decision of the default policy right after an answer of 16 tokens, as a share of the answer's time; medians."""
    random = np.random.default_rng(0)

    def states(n: int, size: int) -> Any:
        return random.normal(size=(n, size)).astype(np.float32)

    policy = Policy("calibrated", dict.fromkeys(WEIGHED["calibrated"], 1.0), 0.0, 0.0, logistic=True)
    answers, scores = [], []
    with Engine.load(bundle) as engine:
        size = engine.backend.tap_size
        examples = ExampleStates(states(10, size), states(10, size), np.zeros(10, np.float32))
        reference = Reference.of(Prototypes(states(SIZE, size), states(1, size)[0], "server"), examples)
        for user in benchmark().validation[:users]:
            for query in user.queries[:10]:
                started = time.perf_counter()
                generation = engine.generate(query.prompt, max_new_tokens=16, ignore_eos=True)
                answered = time.perf_counter()
                policy.decide(signals(generation, reference, policy.weights))
                answers.append(answered - started)
                scores.append(time.perf_counter() - answered)
    answer, score = float(np.median(answers)), float(np.median(scores))
    share = score / answer
    return Row(
        f"time of a score, of that of an answer of 16 tokens: {what}",
        "" if reach is None else f"<= {reach:.0%}",
        f"{share:.2%} ({score * 1e6:.0f} us of {answer * 1e3:.1f} ms); no forward pass",
        None if reach is None else share <= reach,
    )


def _calibrated(measure: str, rows: dict[str, Any], more: dict[str, Any]) -> Iterator[Row]:
    for part, column, reach in (("all", "auroc", "not below"), ("in_task", "auroc_in_task", "above")):
        if (difference := more[part]) is None:
            continue
        calibrated, alone = (rows[name][column]["mean"] for name in ("calibrated", "log_probability"))
        yield Row(
            f"AUROC of wrong answers, {measure}, {part}: calibrated against log-probability alone",
            reach,
            f"{calibrated:.3f} against {alone:.3f}: {difference['mean']:+.3f} "
            f"({difference['low']:+.3f} to {difference['high']:+.3f})",
            difference["high"] >= 0 if part == "all" else difference["mean"] > 0,
        )


def _early(rows: list[dict[str, Any]]) -> Iterator[Row]:
    for row in rows:
        tokens, short = row["tokens"]["0.3"], row["apgr_at_the_end"] - row["apgr"]
        yield Row(
            f"early after {row['after']} tokens: those of routed answers, of the calibrated policy's; APGR less",
            "<= 30 %, <= .02" if row["after"] == EARLY else "",
            f"{tokens:.0%}, {short:+.3f} ({row['apgr']:.3f} against {row['apgr_at_the_end']:.3f})",
            tokens <= 0.3 and short <= 0.02 if row["after"] == EARLY else None,
        )


def _worth(name: str, exact: dict[str, Any], useful: dict[str, Any]) -> Row:
    bought = ", ".join(f"{name} {useful[name]:.3f}" for name in ("apgr", "cpt_50", "cpt_80", "calls_saved"))
    return Row(
        f"{name}, the paper's score" if name == "prototypes_mean" else name,
        "",
        f"AUROC of wrong answers, exact {_interval(exact['auroc'])}, in task {exact['auroc_in_task']['mean']:.3f}, "
        f"useful {_interval(useful['auroc'])}; out of task {exact['auroc_out_of_task']['mean']:.3f}; useful: {bought}",
    )


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
