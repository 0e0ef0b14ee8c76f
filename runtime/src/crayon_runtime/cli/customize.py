"""crayon customize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from crayon_runtime.cli.common import PATH, json_option, note, print_json, print_table, print_text, progress, size_text

if TYPE_CHECKING:
    from crayon_runtime.customize import Customization


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--examples", type=PATH, help="Lines of {prompt, completion}.  [default: those kept from the last time]")
@click.option("--pool", type=PATH, required=True, help="A pool on this device; nothing leaves it.")
@click.option("--refine", is_flag=True, help="Search alpha on the examples, without gradients.")
@click.option("--refine-evaluations", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of that search.")
@click.option("--round", "digits", metavar="DIGITS", type=int, help="Round alpha, so that it tells less.")
@click.option("--noise", metavar="SIGMA", type=float, default=0.0, help="Add noise to alpha, so that it tells less.")
@click.option("--backend", default="auto", show_default=True, help="What computes.")
@click.option("--threads", type=click.IntRange(min=1), help="Cores to compute on.  [default: all physical ones]")
@json_option
def customize(
    bundle: Path,
    examples: Path | None,
    pool: Path,
    refine: bool,
    refine_evaluations: int,
    seed: int,
    digits: int | None,
    noise: float,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Customize a model from about ten examples.

    The adapter is kept in BUNDLE.customized. It takes the place of an earlier one only if it changes what the model says and the
    examples' log-loss did not get worse; otherwise everything stays as it was, and the exit status is 1.
    """
    from crayon_runtime import customize as library
    from crayon_runtime.engine import Engine
    from crayon_runtime.examples import read_examples
    from crayon_runtime.pool import Pool

    folder = library.state_folder(bundle)
    texts = read_examples(examples) if examples else library.kept_examples(folder)
    opened = Pool.open(pool, verify=True)
    with (
        Engine.load(bundle, backend=backend, threads=threads) as engine,
        progress("refining", refine_evaluations if refine else None, unit="evaluations") as on_evaluation,
    ):
        result = library.customize(
            engine,
            texts,
            opened,
            folder=folder,
            refine=refine,
            refine_evaluations=refine_evaluations,
            seed=seed,
            digits=digits,
            noise=noise,
            on_evaluation=on_evaluation,
        )
    if as_json:
        print_json(vars(result))
    else:
        _show(bundle, result)
    if not result.installed:
        click.get_current_context().exit(1)


def _show(bundle: Path, result: Customization) -> None:
    size = len(msgspec.json.encode(result.sent))
    note(
        f"a server would be sent {len(result.alpha)} numbers, {size_text(size)}: {' '.join(f'{a:g}' for a in result.alpha)}\n"
        "they are a fingerprint: whoever sees them again can tell that it is the same user; with --pool nothing is sent"
    )
    rows = [("base model", result.log_loss_base), ("before", result.log_loss_before), ("new adapter", result.log_loss)]
    if result.log_loss_exact is not None:
        rows.append(("without noise and rounding", result.log_loss_exact))
    print_table(["log-loss of the examples", "nats per token"], [[name, f"{loss:.4f}"] for name, loss in rows])
    if result.installed:
        print_text(f"customized: {result.reason}\ncrayon run {bundle} --adapter {result.adapter} PROMPT")
    else:
        kept = f"the earlier adapter stays: {result.adapter}" if result.adapter else "the base model stays as it is"
        print_text(f"not customized: {result.reason}; {kept}")
