"""crayon eval."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click
import msgspec

from crayon_runtime.cli.common import (
    PATH,
    backend_option,
    json_option,
    print_json,
    print_table,
    print_text,
    progress,
)
from crayon_runtime.files import atomic_file
from crayon_server.cli import quiet


@click.command("eval")
@click.argument("bundle", type=PATH)
@click.option("--tasks", required=True, help="Names, separated by commas: piqa,arc_easy or api_calling.")
@click.option("--data", type=PATH, help="A folder with questions in files; for api_calling, a file of calls.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task.  [default: all]")
@click.option("--num-fewshot", type=click.IntRange(min=0), default=0, show_default=True, help="Examples before each.")
@backend_option
@click.option("--adapter", help="Answer with this one: its name in the bundle, or the path of its own bundle.")
@click.option("--apply-chat-template", is_flag=True, help="Ask in the form of the bundle's chat template.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option("--out", type=PATH, help="Write the result into this file too, as JSON.")
@json_option
def evaluate(
    bundle: Path,
    tasks: str,
    data: Path | None,
    limit: int | None,
    num_fewshot: int,
    backend: str,
    adapter: str | None,
    apply_chat_template: bool,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score an exported bundle on zero-shot tasks and on API calling.

    Prompts and metrics are those of lm-evaluation-harness. With --data, tasks come from files; without, from the Hugging Face Hub.
    """
    from crayon_server.evaluate.harness import run

    with quiet(), atomic_file(out) if out else nullcontext() as file:
        result = run(
            bundle,
            [name for name in tasks.split(",") if name],
            data=data,
            limit=limit,
            shots=num_fewshot,
            backend=backend,
            adapter=adapter,
            threads=threads,
            chat=apply_chat_template,
            progress=progress,
        )
        if file:
            file.write(msgspec.json.format(msgspec.json.encode(result)))
    if as_json:
        print_json(result)
        return
    print_table(
        ["task", "metric", "value", "stderr"],
        (
            [name, metric, f"{m['value']:.4f}", "" if m["stderr"] is None else f"{m['stderr']:.4f}"]
            for name, row in result["tasks"].items()
            for metric, m in row["metrics"].items()
        ),
    )
    asked, computed = result["tokens"]["asked"], result["tokens"]["computed"]
    print_text(f"{result['backend']}, {result['seconds']:.1f} s; {computed} of {asked} scored tokens computed")
