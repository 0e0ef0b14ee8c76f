"""crayon bench customization."""

from __future__ import annotations

from typing import Literal

import click

from crayon_runtime.cli.common import json_option, note, print_json, print_table
from crayon_server.cli import quiet


@click.group()
def bench() -> None:
    """Measure what customization gains."""


@bench.command()
@click.option("--users", type=click.Choice(["validation", "test"]), default="validation", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the training, separated by commas.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of every training.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@json_option
def customization(
    users: Literal["validation", "test"], seeds: str, steps: int, threads: int | None, as_json: bool
) -> None:
    """Ten examples of a phone-assistant user: a pool against one LoRA, and what lies between."""
    from crayon_server.evaluate.customization import run
    from crayon_server.pool.build import Settings

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter("integers separated by commas", param_hint="--seeds") from None
    with quiet():
        result = run(users, numbers, Settings(steps=steps, threads=threads), say=note)
    if as_json:
        print_json(result)
        return
    columns = ("em", "em_seen", "em_unseen", "em_deviation", "intent", "log_loss")
    rows = ([name, *(_cell(row[column]) for column in columns)] for name, row in result["rows"].items())
    print_table(["row", *columns], rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
