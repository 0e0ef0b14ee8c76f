"""crayon pool build, crayon blend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.affinity import Weighting
from crayon_runtime.cli.common import (
    PATH,
    json_option,
    print_json,
    print_text,
    progress,
    size_text,
)
from crayon_runtime.errors import InvalidInput
from crayon_server.cli import quiet
from crayon_server.pool.build import TEMPERATURE

if TYPE_CHECKING:
    from crayon_runtime.pool import Mode


@click.group()
def pool() -> None:
    """Build a pool of LoRAs that are blended for each user."""


@pool.command()
@click.option("--model", "model_dir", type=PATH, required=True, help="The base, a Hugging Face folder.")
@click.option("--data", type=PATH, required=True, help='JSON lines of {"prompt", "completion", "group"?}.')
@click.option("--out", type=PATH, required=True, help="The pool to write.")
@click.option("--adapters", type=click.IntRange(min=1), default=16, show_default=True, help="N: how many LoRAs.")
@click.option("--rank", type=click.IntRange(min=1), default=4, show_default=True, help="r of each.")
@click.option("--scale", default=2.0, show_default=True, help="alpha / r of each.")
@click.option(
    "--groups/--no-groups", default=None, help="Use what belongs together.  [default: where every line says it]"
)
@click.option(
    "--recipe",
    type=click.Choice(["paper", "residual", "groups"]),
    help="What indicators are made of.  [default: groups, or residual without]",
)
@click.option(
    "--tap-layer", type=click.IntRange(min=0), help="Whose states are embeddings.  [default: after the last norm]"
)
@click.option("--dimensions", type=click.IntRange(min=1), help="Of the projection.  [default: 8 for groups, else 16]")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=TEMPERATURE, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--learning-rate", default=8e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--force", is_flag=True, help="Replace the pool at --out.")
@json_option
def build(
    model_dir: Path,
    data: Path,
    out: Path,
    groups: bool | None,
    temperature: float,
    force: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Cluster texts, and train a LoRA for each cluster, all of them together."""
    from crayon_server.pool.build import Settings, read_texts
    from crayon_server.pool.build import build as build_pool

    texts, names = read_texts(data)
    if groups and names is None:
        raise InvalidInput('not every line has a "group"', where=data, do="give every line one, or leave out --groups")
    settings = Settings(weighting=Weighting(temperature=temperature), **choices)
    with quiet(), progress("training the pool", settings.steps, unit="steps") as advance:
        built = build_pool(
            model_dir,
            texts,
            out,
            groups=None if groups is False else names,
            settings=settings,
            on_step=lambda _step, _loss: advance(1),
            replace=force,
        )
    manifest = built.manifest
    if as_json:
        print_json(
            {"pool": out, "version": manifest.version, "grouped": manifest.grouped, "settings": manifest.settings}
        )
    else:
        known = "told by the data" if manifest.grouped else "not used"
        print_text(f"recipe {manifest.settings['recipe']}; which texts belong together: {known}")
        print_text(f"loss {manifest.settings['final_loss']:.4f} nats per answer token, mean of the last steps\n{out}")


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
