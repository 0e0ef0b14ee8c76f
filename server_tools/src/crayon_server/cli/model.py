"""crayon model create, crayon model convert, crayon model train."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crayon_runtime.cli.common import PATH, json_option, print_json, progress
from crayon_server.cli import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crayon_server.training import OnStep


@click.group()
def model() -> None:
    """Create, convert or train the models that devices run."""


@model.command()
@click.argument("arch")
@click.option("--out", type=PATH, required=True, help="The Hugging Face folder to write.")
@click.option("--pretrained", is_flag=True, help="The shipped weights instead of random ones.")
@click.option("--seed", default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--tokenizer",
    type=PATH,
    help="A tokenizer.json, tokenizer.model or folder to put beside the weights.  [default: the benchmark's for nano, else none]",
)
@click.option(
    "--vocab-size", type=click.IntRange(min=3), help="Rows of the embedding.  [default: the tokenizer's, or 32000]"
)
@click.option("--force", is_flag=True, help="Replace the folder at --out.")
def create(
    arch: str, out: Path, pretrained: bool, seed: int, tokenizer: Path | None, vocab_size: int | None, force: bool
) -> None:
    """Write a model folder of ARCH for transformers and `crayon export`.

    ARCH is nano, nano-server, mobilellm-125m, -350m, -600m, -1b or -1.5b, or with shared layers mobilellm-ls-125m to -1.5b.
    """
    from crayon_server import models

    with quiet():
        models.create(
            arch, out, pretrained=pretrained, seed=seed, replace=force, tokenizer=tokenizer, vocab_size=vocab_size
        )
    if tokenizer is None and arch not in models.NANO:
        click.echo("it has no tokenizer: name one with --tokenizer here, or when it is exported", err=True)
    click.echo(out)


@model.command()
@click.argument("source", type=PATH)
@click.option(
    "--to", "layout", required=True, help="mobilellm (this project's), released (facebook/MobileLLM-*), or llama."
)
@click.option("--out", type=PATH, required=True, help="The Hugging Face folder to write.")
@click.option("--force", is_flag=True, help="Replace the folder at --out.")
def convert(source: Path, layout: str, out: Path, force: bool) -> None:
    """Write a MobileLLM folder in another layout; SOURCE is one of this project, or a released checkpoint."""
    with quiet():
        from crayon_server.models import mobilellm

        mobilellm.convert(source, out, layout, replace=force)
    click.echo(out)


@model.command()
@click.argument("arch")
@click.option("--out", type=PATH, required=True, help="The Hugging Face folder to write.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps.  [default: those of the shipped models]")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the folder at --out.")
@json_option
def train(arch: str, out: Path, steps: int | None, seed: int, threads: int | None, force: bool, as_json: bool) -> None:
    """Pre-train ARCH (nano, nano-server) on the phone-assistant benchmark."""
    from crayon_server.models.pretrain import STEPS, pretrain

    steps = steps or STEPS
    with quiet(), _bar(f"training {arch}", steps) as on_step:
        losses = pretrain(arch, out, steps=steps, seed=seed, threads=threads, on_step=on_step, replace=force)
    last = losses[-100:]
    loss = sum(last) / len(last)
    if as_json:
        print_json({"model": out, "steps": steps, "loss": loss})
    else:
        click.echo(f"loss {loss:.3f} nats per token, mean of the last {len(last)} steps\n{out}")


@contextmanager
def _bar(title: str, steps: int) -> Iterator[OnStep]:
    with progress(title, steps, unit="steps") as advance:
        yield lambda _step, _loss: advance(1)
