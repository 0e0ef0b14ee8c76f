"""crayon model create, crayon model convert, crayon model train."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.cli.common import PATH, json_option, note, print_json, print_text, progress
from crayon_runtime.errors import InvalidInput
from crayon_server.cli import quiet, work_folder

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
@click.option(
    "--layer-repeats", type=click.IntRange(min=1), help="Compute each block so often.  [default: 2 for ls, else 1]"
)
@click.option("--force", is_flag=True, help="Replace the folder at --out.")
def create(
    arch: str,
    out: Path,
    pretrained: bool,
    seed: int,
    tokenizer: Path | None,
    vocab_size: int | None,
    layer_repeats: int | None,
    force: bool,
) -> None:
    """Write a model folder of ARCH for transformers and `crayon export`.

    ARCH is nano, nano-server, mobilellm-125m, -350m, -600m, -1b or -1.5b, or with shared layers mobilellm-ls-125m to -1.5b.
    """
    from crayon_server import models

    with quiet():
        models.create(
            arch, out, pretrained=pretrained, seed=seed, replace=force, tokenizer=tokenizer, vocab_size=vocab_size,
            layer_repeats=layer_repeats,
        )  # fmt: skip
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
@click.argument("start", metavar="ARCH|FOLDER")
@click.option(
    "--data",
    multiple=True,
    help="Texts: .txt (a blank line ends a text), JSON lines or Parquet with the field text, or with prompt and completion; here or at a URL; "
    "a folder that `datasets` has saved; OWNER/NAME[:SPLIT] on the Hugging Face Hub. May be given again.",
)
@click.option(
    "--fields", help="What they are called in the data, as text=passage or prompt=question,completion=answer."
)
@click.option("--out", type=PATH, required=True, help="The Hugging Face folder to write.")
@click.option("--tokenizer", type=PATH, help="Of a new model: a tokenizer.json, tokenizer.model or folder.")
@click.option("--teacher", type=PATH, help="A Hugging Face folder whose logits are learned, too.")
@click.option(
    "--distill-weight", type=click.FloatRange(0, 1), help="Of the teacher against the labels.  [default: 0.5]"
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of the distillation.  [default: 1]")
@click.option(
    "--context-length", type=click.IntRange(min=2), help="Tokens of a sequence, at most.  [default: the model's]"
)
@click.option(
    "--steps", type=click.IntRange(min=1), help="Optimizer steps.  [default: one pass over the data; 2000 without]"
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Sequences, of all processes.  [default: 32]")
@click.option("--learning-rate", type=float, help="The peak.  [default: 0.002 for ARCH, 0.0002 for FOLDER]")
@click.option("--warmup", type=click.IntRange(min=0), help="Steps.  [default: a twentieth]")
@click.option("--weight-decay", type=float, help="Of matrices.  [default: 0.1]")
@click.option("--prompt-weight", type=click.FloatRange(0, 1), help="Of the loss of prompts.  [default: 0]")
@click.option("--held-out", type=click.FloatRange(0, 1, max_open=True), help="Share for validation.  [default: 0.01]")
@click.option("--validate-every", type=click.IntRange(min=1), help="Steps.  [default: 100]")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), help="[default: as accelerate is configured]")
@click.option("--gradient-accumulation", type=click.IntRange(min=1), help="Parts of a batch.  [default: 1]")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Compute activations again, to save memory.")
@click.option("--peak-tflops", type=float, help="Of a device, for MFU.  [default: measured]")
@click.option(
    "--work",
    type=PATH,
    help="A folder for tokens and checkpoints, from which a training that was killed goes on.  [default: OUT.work, removed at the end]",
)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps.  [default: 100]")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the folder at --out.")
@json_option
def train(
    start: str,
    data: tuple[str, ...],
    fields: str | None,
    out: Path,
    work: Path | None,
    force: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Train a new model of ARCH, or go on with the one in FOLDER.

    Without --data, nano and nano-server are trained as they are shipped, on the phone-assistant benchmark.

    On several GPUs: accelerate launch -m crayon_runtime model train ...
    """
    given = {name: value for name, value in choices.items() if value is not None}
    if data:
        done = _train(start, data, fields, out, work, force, given)
    else:
        done = _pretrain(start, out, force, given, fields=fields, work=work)
    if done is None:
        return
    if as_json:
        print_json(done)
    else:
        for name, value in done.items():
            note(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print_text(str(out))


def _train(
    start: str,
    data: tuple[str, ...],
    fields: str | None,
    out: Path,
    work: Path | None,
    force: bool,
    given: dict[str, Any],
) -> dict[str, Any] | None:
    """What to print, by one process."""
    from crayon_server import training
    from crayon_server.models import train as library
    from crayon_server.pool.data import FIELDS, PLAIN, parse_fields

    others = {name: given.pop(name) for name in ("tokenizer", "teacher", "checkpoint_every") if name in given}
    settings = library.Settings(**given)
    renamed = parse_fields(fields, (*FIELDS, *PLAIN)) if fields else None
    place = training.accelerator(settings.mixed_precision)
    main = place.is_main_process
    with quiet(), work_folder(work, out, "training-*/checkpoint", remove=main) as folder, ExitStack() as stack:

        def on_start(steps: int) -> None:
            if main:
                advance.append(stack.enter_context(_bar(f"training {start}", steps)))

        def on_step(step: int, loss: float) -> None:
            for told in advance:
                told(step, loss)

        advance: list[OnStep] = []
        trained = library.train(
            start, data, out, settings=settings, fields=renamed, work=folder, place=place, on_start=on_start,
            on_step=on_step, replace=force, **others,
        )  # fmt: skip
    shown = ("steps", "loss", "validation_loss", "tokens", "tokens_per_second", "mfu", "held_out", "left_out")
    return {"model": out, **{name: getattr(trained, name) for name in shown}} if main else None


def _pretrain(start: str, out: Path, force: bool, given: dict[str, Any], **others: Any) -> dict[str, Any]:
    """On the benchmark, which has settings of its own."""
    from crayon_server.models.pretrain import STEPS, pretrain

    needless = {*given, *(name for name, value in others.items() if value is not None)} - {"steps", "seed", "threads"}
    if needless:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(needless))
        raise InvalidInput(f"{names}: only with texts of your own", do="name them with --data")
    steps = given.pop("steps", STEPS)
    with quiet(), _bar(f"training {start}", steps) as on_step:
        losses = pretrain(start, out, steps=steps, on_step=on_step, replace=force, **given)
    last = losses[-100:]
    return {"model": out, "steps": steps, "loss": sum(last) / len(last)}


@contextmanager
def _bar(title: str, steps: int) -> Iterator[OnStep]:
    with progress(title, steps, unit="steps") as advance:
        yield lambda _step, _loss: advance(1)
