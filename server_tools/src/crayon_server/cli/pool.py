"""crayon pool build, import, add, prototypes and inspect; crayon blend."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from crayon_runtime.affinity import Weighting
from crayon_runtime.cli.common import (
    PATH,
    json_option,
    note,
    print_json,
    print_table,
    print_text,
    progress,
    size_text,
)
from crayon_runtime.errors import InvalidInput
from crayon_server.cli import quiet, work_folder
from crayon_server.pool.build import TEMPERATURE
from crayon_server.pool.prototypes import PER_CLUSTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

    from crayon_runtime.pool import Mode
    from crayon_server.pool.imported import Source
    from crayon_server.pool.prototypes import Made

TEXTS = "texts.jsonl"
"""In the work folder."""


@click.group()
def pool() -> None:
    """Build a pool of LoRAs that are blended for each user."""


@pool.command()
@click.option("--model", "model_dir", type=PATH, required=True, help="The base, a Hugging Face folder.")
@click.option(
    "--data",
    required=True,
    help='Texts, {"prompt", "completion", "group"?}: JSON lines or Parquet, here or at a URL (* for several files); a folder that '
    "`datasets` has saved; OWNER/NAME[:SPLIT] on the Hugging Face Hub.",
)
@click.option("--fields", help="What they are called in the data, as prompt=question,completion=answer,group=user.")
@click.option("--out", type=PATH, required=True, help="The pool to write.")
@click.option("--adapters", type=click.IntRange(min=1), default=16, show_default=True, help="N: how many LoRAs.")
@click.option("--rank", type=click.IntRange(min=1), default=4, show_default=True, help="r of each.")
@click.option("--scale", default=2.0, show_default=True, help="alpha / r of each.")
@click.option(
    "--groups/--no-groups", default=None, help="Use what belongs together.  [default: where every text says it]"
)
@click.option(
    "--recipe",
    type=click.Choice(["paper", "residual", "groups"]),
    help="What indicators are made of.  [default: groups, or residual without]",
)
@click.option(
    "--tap-layer", type=click.IntRange(min=0), help="Whose states are embeddings.  [default: after the last norm]"
)
@click.option("--embed-with", type=PATH, help="Embed with this exported bundle of the model, as devices will.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Of the projection.  [default: 8 for groups, else 16]")
@click.option(
    "--weighting",
    type=click.Choice(["softmax", "relu", "topk", "raw"]),
    default="softmax",
    show_default=True,
    help="How cosines become alpha.",
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=TEMPERATURE, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Of the weighting topk.  [default: 1]")
@click.option(
    "--sample", type=click.IntRange(min=1), default=10, show_default=True, help="Texts whose mean stands for a group."
)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Of all processes.")
@click.option("--learning-rate", default=8e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Leave longer texts out.  [default: the context's]")
@click.option(
    "--mixed-precision",
    type=click.Choice(["no", "bf16"]),
    help="bf16 holds the base in bfloat16.  [default: as accelerate is configured]",
)
@click.option(
    "--gradient-accumulation", type=click.IntRange(min=1), default=1, show_default=True, help="Parts of a batch."
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations again, to save memory.")
@click.option(
    "--work",
    type=PATH,
    help="A folder for embeddings and checkpoints, from which a build that was killed goes on.  [default: OUT.work, removed at the end]",
)
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=100, show_default=True, help="Steps.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the pool at --out.")
@json_option
def build(
    model_dir: Path,
    data: str,
    fields: str | None,
    out: Path,
    groups: bool | None,
    weighting: Literal["softmax", "relu", "topk", "raw"],
    temperature: float,
    top_k: int | None,
    embed_with: Path | None,
    work: Path | None,
    checkpoint_every: int,
    force: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Cluster texts, and train a LoRA for each cluster, all of them together.

    On several GPUs: accelerate launch -m crayon_runtime pool build ...
    """
    from crayon_server import training
    from crayon_server.pool.build import Settings, check_out
    from crayon_server.pool.build import build as build_pool
    from crayon_server.pool.data import Texts, parse_fields

    settings = Settings(weighting=Weighting(weighting, temperature, top_k), **choices)
    check_out(out, replace=force)
    renamed = parse_fields(fields) if fields else None
    place = training.accelerator(settings.mixed_precision)
    with (
        quiet(),
        work_folder(work, out, "embeddings-*", remove=place.is_main_process) as folder,
        _bars(settings.steps, place) as bars,
    ):
        if place.is_main_process:
            Texts.write(data, folder / TEXTS, renamed)
        place.wait_for_everyone()
        texts = Texts(folder / TEXTS)
        names = texts.groups
        if groups and names is None:
            raise InvalidInput(
                "not every text has a group", where=data, do="give every text one, or leave out --groups"
            )
        bars.texts = len(texts)
        built = build_pool(
            model_dir,
            texts,
            out,
            groups=None if groups is False else names,
            settings=settings,
            embed_with=embed_with,
            work=folder,
            checkpoint_every=checkpoint_every,
            place=place,
            on_texts=bars.on_texts,
            on_step=bars.on_step,
            say=bars.say,
            replace=force,
        )
    if not place.is_main_process:
        return
    manifest = built.manifest
    if as_json:
        print_json(
            {"pool": out, "version": manifest.version, "grouped": manifest.grouped, "settings": manifest.settings}
        )
    else:
        print_text(f"loss {manifest.settings['final_loss']:.4f} nats per answer token, mean of the last steps\n{out}")


class _Bars:
    """A bar for embedding, then one for training; what is said stands above them. All of it by one process."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.texts, self._steps, self._shown = 0, steps, shown
        self._stack, self._title = ExitStack(), ""
        self._advance: Callable[[int], None] = lambda _: None

    def on_texts(self, count: int) -> None:
        self._bar("embedding", self.texts, "texts")(count)

    def on_step(self, _step: int, _loss: float) -> None:
        self._bar("training the pool", self._steps, "steps")(1)

    def say(self, text: str) -> None:
        self.close()
        if self._shown:
            note(text)

    def close(self) -> None:
        self._stack.close()
        self._title = ""

    def _bar(self, title: str, total: int, unit: str) -> Callable[[int], None]:
        if self._shown and title != self._title:
            self.close()
            self._title, self._advance = title, self._stack.enter_context(progress(title, total, unit=unit))
        return self._advance


@contextmanager
def _bars(steps: int, place: Accelerator) -> Iterator[_Bars]:
    bars = _Bars(steps, place.is_main_process)
    try:
        yield bars
    finally:
        bars.close()


LORA = click.option(
    "--lora",
    "loras",
    type=(PATH, str),
    multiple=True,
    required=True,
    metavar="PEFT_DIR DATA",
    help="A PEFT folder, and texts that it was trained on, in any form that `pool build` reads. Repeatable.",
)


@pool.command("import")
@click.option("--model", "model_dir", type=PATH, required=True, help="Their base, a Hugging Face folder.")
@LORA
@click.option("--out", type=PATH, required=True, help="The pool to write.")
@click.option(
    "--recipe",
    type=click.Choice(["paper", "residual", "groups"]),
    default="residual",
    show_default=True,
    help="How the projection is fitted.",
)
@click.option(
    "--tap-layer", type=click.IntRange(min=0), help="Whose states are embeddings.  [default: after the last norm]"
)
@click.option("--dimensions", type=click.IntRange(min=1), help="Of the projection.  [default: 8 for groups, else 16]")
@click.option("--top-k", type=click.IntRange(min=1), help="Blend the nearest only.  [default: all]")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=TEMPERATURE, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the pool at --out.")
@json_option
def import_(
    model_dir: Path,
    loras: tuple[tuple[Path, str], ...],
    out: Path,
    top_k: int | None,
    temperature: float,
    force: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Make a pool of LoRAs that were trained elsewhere."""
    from crayon_server.pool.imported import import_pool

    weighting = Weighting("topk" if top_k else "softmax", temperature, top_k)
    with quiet():
        made = import_pool(model_dir, _sources(loras), out, weighting=weighting, replace=force, **choices)
    settings = made.manifest.settings
    if as_json:
        print_json({"pool": out, "version": made.manifest.version, "settings": settings})
    else:
        apart = settings["told_apart"]
        print_text(f"{made.manifest.adapters} LoRAs, brought to rank {made.manifest.rank}")
        if apart is not None:
            print_text(
                f"{apart:.0%} of texts lie nearest to their own LoRA, if the others are used to find where it is"
            )
        print_text(str(out))


@pool.command()
@click.argument("pool_dir", metavar="POOL", type=PATH)
@click.option("--model", "model_dir", type=PATH, required=True, help="The pool's base, a Hugging Face folder.")
@LORA
@click.option("--out", type=PATH, help="The pool to write.  [default: POOL itself, replaced as a whole]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the pool at --out.")
@json_option
def add(
    pool_dir: Path,
    model_dir: Path,
    loras: tuple[tuple[Path, str], ...],
    out: Path | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Add a LoRA to a pool. Those that are in it stay as they are."""
    from crayon_runtime.pool import Pool
    from crayon_server.pool.imported import add_lora

    if len(loras) > 1:
        raise InvalidInput(f"{len(loras)} LoRAs at once", where="--lora", do="add one after the other")
    opened = Pool.open(pool_dir, verify=True)
    with quiet():
        grown = add_lora(
            opened, model_dir, _sources(loras)[0], out or opened.path, threads=threads, replace=force or out is None
        )
    manifest = grown.manifest
    added = manifest.settings["added"][-1]
    if as_json:
        print_json({"pool": grown.path, "version": manifest.version, "serial": manifest.serial, "added": added})
    else:
        nearest = added["nearest"]
        print_text(
            f"LoRA {added['adapter']}; its texts lie nearest to those of LoRA {nearest['adapter']}"
            f" (cosine {nearest['cosine']:.2f})\nversion {manifest.version}, serial {manifest.serial}\n{out or pool_dir}"
        )


@pool.command()
@click.argument("pool_dir", metavar="POOL", type=PATH)
@click.option(
    "--upstream",
    metavar="URL|DIR|BUNDLE",
    required=True,
    help="The server LLM: an OpenAI-compatible endpoint, a Hugging Face folder, or a bundle.",
)
@click.option("--upstream-model", help="Its name at the endpoint.  [default: the first that it lists]")
@click.option("--upstream-key-file", type=PATH, help="A file with the key that the endpoint asks for.")
@click.option(
    "--plain-http", is_flag=True, help="Allow http to another machine: everybody on the way can read the inputs."
)
@click.option("--model", "model_dir", type=PATH, help="The pool's base, a Hugging Face folder, to embed with.")
@click.option("--embed-with", type=PATH, help="Or an exported bundle of it: embed as devices do.")
@click.option("--data", help="Inputs, in any form that `pool build` reads.  [default: the pool's typical texts]")
@click.option("--per-cluster", type=click.IntRange(min=1), default=PER_CLUSTER, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an output.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Requests at once.")
@click.option("--out", type=PATH, help="The pool to write.  [default: POOL itself, replaced as a whole]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the pool at --out.")
@json_option
def prototypes(
    pool_dir: Path,
    upstream: str,
    upstream_model: str | None,
    upstream_key_file: Path | None,
    plain_http: bool,
    model_dir: Path | None,
    embed_with: Path | None,
    data: str | None,
    per_cluster: int,
    max_new_tokens: int,
    concurrency: int,
    out: Path | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Ask the server LLM what it says to typical texts, for devices to tell when to ask it.

    Outputs are kept in POOL.prototypes.jsonl until the pool is written: the same command goes on where it was stopped.
    """
    from crayon_runtime.pool import Pool
    from crayon_server import training
    from crayon_server.pool import prototypes as library
    from crayon_server.pool.build import check_out
    from crayon_server.pool.data import read_texts

    if (model_dir is None) == (embed_with is None):
        raise click.UsageError("give either --model or --embed-with")
    opened = Pool.open(pool_dir, verify=True)
    out = out or opened.path
    check_out(out, replace=force or out == opened.path)
    with quiet(), training.threads(threads), ExitStack() as stack:
        embedder: library.Embedder
        if embed_with is not None:
            engine = stack.enter_context(library.open_engine(embed_with, opened, threads))
            embedder = library.BundleEmbedder(engine)
        else:
            assert model_dir is not None
            embedder = library.ModelEmbedder(model_dir, opened)
        if data is None:
            inputs = library.typical_inputs(opened, per_cluster)
        else:
            inputs = library.inputs_of(opened, read_texts(data)[0], embedder, per_cluster)
        name, answer = stack.enter_context(
            _server(upstream, upstream_model, upstream_key_file, plain_http, max_new_tokens, concurrency)
        )
        said = library.Said(opened.path.with_name(f"{opened.path.name}.prototypes.jsonl"), name, max_new_tokens)
        prompts = len({text.prompt for text in inputs})
        with progress("asking the server LLM", prompts, unit="inputs") as on_output:
            outputs = library.collect(inputs, said, answer, on_output)
        with progress("embedding", len(inputs), unit="outputs") as on_texts:
            made = library.add_prototypes(
                opened,
                inputs,
                outputs,
                embedder,
                out,
                model=name,
                choices={
                    "per_cluster": per_cluster,
                    "max_new_tokens": max_new_tokens,
                    "embedded_with": "the model" if embed_with is None else "the bundle",
                    "inputs": "typical texts" if data is None else "other texts",
                },
                on_texts=on_texts,
                replace=force or out == opened.path,
            )
        said.path.unlink(missing_ok=True)
    _show_prototypes(made, out, as_json)


@contextmanager
def _server(
    upstream: str, model: str | None, key_file: Path | None, plain_http: bool, max_tokens: int, concurrency: int
) -> Iterator[tuple[str, Callable[[Sequence[str]], Iterator[tuple[str, str]]]]]:
    """The server LLM's name, and what gives its outputs."""
    from crayon_runtime.cli.customize import read_key
    from crayon_server.pool import prototypes as library
    from crayon_server.upstream import Upstream
    from crayon_server.upstream.local import serving

    with ExitStack() as stack:
        url, key, folder = upstream, read_key(key_file), Path(upstream)
        if "://" not in upstream:
            if model is not None or key is not None:
                raise click.UsageError("--upstream-model and --upstream-key-file are for a URL")
            if not folder.is_file() and not (folder / "manifest.json").is_file():
                yield folder.resolve().name, lambda prompts: library.ask_model(folder, prompts, max_tokens=max_tokens)
                return
            url, key = stack.enter_context(serving(folder, waiting=concurrency))
        server = stack.enter_context(
            Upstream(url, model=model, api_key=key, plain_http=plain_http, concurrency=concurrency)
        )
        yield (
            server.model(),
            lambda prompts: library.ask(server, prompts, max_tokens=max_tokens, concurrency=concurrency),
        )


def _show_prototypes(made: Made, out: Path, as_json: bool) -> None:
    manifest = made.pool.manifest
    assert manifest.prototypes is not None
    if as_json:
        print_json(
            {
                "pool": out,
                "version": manifest.version,
                "serial": manifest.serial,
                "model": manifest.prototypes.model,
                "count": manifest.prototypes.count,
                "of_clusters": made.prototypes,
                "empty": made.empty,
                "too_long": made.too_long,
            }
        )
        return
    if made.empty or made.too_long:
        note(f"left out: {made.empty} empty outputs, and {made.too_long} that the base has no room for")
    if lacking := [str(n) for n, count in enumerate(made.prototypes) if not count]:
        note(f"without prototypes: cluster {', '.join(lacking)}")
    print_text(
        f"{manifest.prototypes.count} prototypes, outputs of {manifest.prototypes.model}\n"
        f"version {manifest.version}, serial {manifest.serial}\n{out}"
    )


def _sources(loras: tuple[tuple[Path, str], ...]) -> list[Source]:
    from crayon_server.pool.data import read_texts
    from crayon_server.pool.imported import Source

    for adapter, data in loras:
        if adapter.is_file() and Path(data).is_dir():
            raise InvalidInput("this is a file", where=adapter, do="give the PEFT folder first, and then its data")
    return [Source(adapter, read_texts(data)[0]) for adapter, data in loras]


@pool.command()
@click.argument("pool_dir", metavar="POOL", type=PATH)
@click.option("--out", type=PATH, help="The page to write.  [default: POOL.html, beside it; with --json none]")
@json_option
def inspect(pool_dir: Path, out: Path | None, as_json: bool) -> None:
    """Show a pool in one HTML page: its clusters, their texts, how large and how alike its LoRAs are."""
    from crayon_runtime.pool import Pool
    from crayon_server.pool.inspect import inspect, write_report

    inspected = inspect(Pool.open(pool_dir, verify=True))
    if out is None and not as_json:
        out = pool_dir.resolve().with_name(f"{pool_dir.resolve().name}.html")
    if out is not None:
        write_report(inspected, out)
    if as_json:
        print_json(inspected.to_dict() | {"report": out})
    else:
        print_text(f"{inspected.recipe}\n")
        rows = [
            [str(n), str(inspected.sizes[n]) if inspected.sizes else "-", f"{norm:.3g}"]
            for n, norm in enumerate(inspected.norms)
        ]
        print_table(["LoRA", "texts", "norm"], rows)
        print_text(f"\n{out}")


@click.command()
@click.argument("pool_dir", metavar="POOL", type=PATH)
@click.option("--weights", type=PATH, required=True, help="A JSON file: the list alpha of N numbers.")
@click.option("--out", type=PATH, required=True, help="The PEFT directory to write.")
@click.option("--mode", type=click.Choice(["separate", "concat", "svd"]), help="[default: as the pool was trained]")
@click.option("--rank", type=click.IntRange(min=1), help="Of svd.  [default: the rank of one LoRA]")
@click.option("--force", is_flag=True, help="Replace the directory at --out.")
@json_option
def blend(
    pool_dir: Path, weights: Path, out: Path, mode: Mode | None, rank: int | None, force: bool, as_json: bool
) -> None:
    """Blend a pool's LoRAs into one PEFT adapter."""
    from crayon_runtime.pool import Pool
    from crayon_server.pool.blend import blend, size

    try:
        alpha = json.loads(weights.read_bytes())
    except OSError as e:
        raise InvalidInput(f"alpha cannot be read: {e.strerror}", where=weights) from None
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"alpha is not JSON: {e}", where=weights, do="write a list of numbers") from None
    blended = blend(Pool.open(pool_dir), alpha, out, mode=mode, rank=rank, replace=force)
    written, error = size(out), blended.error
    if as_json:
        print_json({"adapter": out, "mode": blended.mode, "rank": blended.rank, "bytes": written, "error": error})
    else:
        print_text(
            f"{blended.mode}, rank {blended.rank}, {size_text(written)}; {error:.3f} from sum alpha_n B_n A_n\n{out}"
        )
