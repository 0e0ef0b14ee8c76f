"""`python -m benchmarks [NAME …]`: run the benchmarks, print one table."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.table import Row, machine, render

NAMES = (
    "parity",
    "evaluation",
    "groups",
    "rounding",
    "decode",
    "startup",
    "constrained",
    "device_server",
    "joint",
    "blend",
    "customize",
    "service",
    "customization",
    "routing",
    "training",
    "ablation",
    "llama7b",
    "pte",
    "native",
    "mobilellm",
    "profile",
    "kotlin",
)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keep checkpoints and bundles here.  [default: temporary]"
)
@click.option("--text", help="Plain texts for the ablation, as `crayon model train --data` takes them.")
@click.option("--text-field", default="text", show_default=True, help="What they are called in it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(names: tuple[str, ...], work: Path | None, text: str | None, text_field: str, as_json: bool) -> None:
    takes = {"ablation": {"text": text, "text_field": text_field}}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="crayon-bench-") as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or NAMES:
            started = time.perf_counter()
            print(f"{name}: {importlib.import_module(f'benchmarks.{name}').__doc__}", file=sys.stderr)
            for row in importlib.import_module(f"benchmarks.{name}").run(folder, **takes.get(name, {})):
                print(f"  {row.what}: {row.measured}", file=sys.stderr, flush=True)
                rows.append(row)
            print(f"  ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [r.to_dict() for r in rows]}, indent=1))
    else:
        print(f"\n{machine()}\n\n{render(rows)}")


if __name__ == "__main__":
    main()
