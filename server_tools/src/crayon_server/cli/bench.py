"""crayon bench customization, routing and qa."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from crayon_runtime.cli.common import PATH, json_option, note, print_json, print_table, print_text
from crayon_runtime.files import atomic_file
from crayon_server.cli import quiet

if TYPE_CHECKING:
    from crayon_server.evaluate.qa.intervals import Estimate


@click.group()
def bench() -> None:
    """Measure what customization gains, and what routing saves."""


@bench.command()
@click.option("--users", type=click.Choice(["validation", "test"]), default="validation", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the training, separated by commas.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of every training.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds at the same time.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each job.  [default: all]")
@json_option
def customization(
    users: Literal["validation", "test"], seeds: str, steps: int, jobs: int, threads: int | None, as_json: bool
) -> None:
    """Ten examples of a phone-assistant user: a pool against one LoRA, and what lies between."""
    from crayon_server.evaluate.customization import run
    from crayon_server.pool.build import Settings

    with quiet():
        result = run(users, _numbers(seeds), Settings(steps=steps, threads=threads), say=note, jobs=jobs)
    if as_json:
        print_json(result)
        return
    columns = ("em", "em_seen", "em_unseen", "em_deviation", "intent", "structure", "log_loss")
    rows = ([name, *(_cell(row[column]) for column in columns)] for name, row in result["rows"].items())
    print_table(["row", *columns], rows)
    print_text(
        f"prompt tokens: {result['prompt_tokens']['plain']:.0f}, few_shot {result['prompt_tokens']['few_shot']:.0f}"
    )
    print_table(
        ["alpha, int4 against float: cosine", "mean", "min"],
        ([name, f"{cosine['mean']:.4f}", f"{cosine['min']:.4f}"] for name, cosine in result["alpha"].items()),
    )
    print_table(
        ["noise on alpha", "digits", "em", "recognized"],
        ([str(d["noise"]), str(d["digits"] or ""), _cell(d["em"]), _cell(d["recognized"])] for d in result["privacy"]),
    )


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter("integers separated by commas", param_hint="--seeds") from None


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@bench.command()
@click.option("--users", type=click.Choice(["validation", "test"]), default="validation", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the training, separated by commas.")
@click.option("--limit", type=click.IntRange(min=1), help="Users that are reported.  [default: all]")
@click.option("--server", "server_dir", type=PATH, help="A Hugging Face folder.  [default: the embedded server model]")
@click.option("--plot", type=PATH, help="Draw what calls buy into this SVG file.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of every training.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds at the same time.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each job.  [default: all]")
@json_option
def routing(
    users: Literal["validation", "test"],
    seeds: str,
    limit: int | None,
    server_dir: Path | None,
    plot: Path | None,
    steps: int,
    jobs: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """When a customized phone assistant asks a server: every signal and policy, and what they save."""
    from crayon_server.evaluate.routing import run
    from crayon_server.evaluate.routing.plot import draw
    from crayon_server.pool.build import Settings

    settings = Settings(steps=steps, threads=threads)
    with quiet():
        result = run(users, _numbers(seeds), settings, note, server_dir=server_dir, limit=limit, jobs=jobs)
    if plot is not None:
        with atomic_file(plot) as file:
            file.write(draw(result))
    if as_json:
        print_json(result)
        return
    for measure, rows in result["rows"].items():
        _print_routing(measure, rows)
        for part, more in result["differences"][measure].items():
            if more is not None:
                print_text(f"calibrated less log_probability, AUROC {part}: {_interval(more)}")
    right = result["accuracy"]
    parts = list(right["device"]["exact"])
    print_table(
        ["right", "measure", *parts],
        (
            [who, measure, *(_cell(shares[part]) for part in parts)]
            for who, measures in right.items()
            for measure, shares in measures.items()
        ),
    )
    for measure in ("useful", "oracle_server"):
        _print_early(measure, result["early"][measure])
    counts = result["users"]
    print_text(
        f"{counts['reported']} users; policies are fitted on {counts['fitted']} others, "
        f"for {result['budget']:.0%} of calls; {result['device_tokens']:.1f} tokens an answer"
    )


def _print_routing(measure: str, rows: dict[str, dict[str, Any]]) -> None:
    found = ("auroc", "auroc_in_task", "auroc_other_domain", "auroc_out_of_task")
    bought = ("apgr", "cpt_50", "cpt_80", "calls_saved", "calls", "accuracy")
    print_table(
        [measure, *found, *bought],
        (
            [name, *("" if row[c] is None else _interval(row[c]) for c in found), *(_cell(row[c]) for c in bought)]
            for name, row in rows.items()
        ),
    )


def _print_early(measure: str, rows: list[dict[str, Any]]) -> None:
    """What deciding early costs and saves."""
    shares = list(rows[0]["tokens"])
    print_table(
        [f"early, {measure}: tokens", "apgr", "at the end", *(f"tokens at {float(s):.0%} of calls" for s in shares)],
        (
            [str(row["after"]), _cell(row["apgr"]), _cell(row["apgr_at_the_end"]), *map(_cell, row["tokens"].values())]
            for row in rows
        ),
    )


@bench.command()
@click.option("--model", "model_dir", type=PATH, required=True, help="The base, a Hugging Face folder.")
@click.option("--data", type=PATH, required=True, help="The folder of the questions: siqa_train.jsonl and others.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=500, show_default=True, help="Test questions of each task."
)
@click.option("--adapters", type=click.IntRange(min=1), default=16, show_default=True, help="N: how many LoRAs.")
@click.option("--rank", type=click.IntRange(min=1), default=4, show_default=True, help="r of each.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of every training.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--learning-rate", default=8e-3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of training, and of who gets which questions.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@json_option
def qa(model_dir: Path, data: Path, limit: int, as_json: bool, **choices: Any) -> None:
    """Ten questions with their answers, of SIQA, OpenBookQA, MedMCQA, and of 57 users of MMLU: any model."""
    from crayon_server.evaluate.qa import run
    from crayon_server.pool.build import Settings

    with quiet():
        result = run(model_dir, data, limit=limit, settings=Settings(**choices), say=note)
    if as_json:
        print_json(result)
        return
    columns = ("log_loss", "log_loss_change", "accuracy", "accuracy_change")
    print_table(
        ["row", *columns], ([name, *(_interval(row[c]) for c in columns)] for name, row in result["rows"].items())
    )
    tasks = result["tasks"]
    print_table(
        ["log_loss", *tasks],
        (
            [name, *(_interval(row["tasks"][task]["log_loss"]) for task in tasks)]
            for name, row in result["rows"].items()
        ),
    )
    for name, task in tasks.items():
        print_text(
            f"{name}: {task['test']} of {task['of']} test questions; {task['dropped']} duplicates of them dropped"
        )
    print_text(f"{result['users']} users, {result['training']} questions to train on, chance {result['chance']:.3f}")
    if result["note"]:
        print_text(result["note"])


def _interval(value: Estimate) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
