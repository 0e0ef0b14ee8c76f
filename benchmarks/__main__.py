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
    "groups",
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
    "llama7b",
    "pte",
    "native",
    "mobilellm",
    "profile",
)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keep checkpoints and bundles here.  [default: temporary]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(names: tuple[str, ...], work: Path | None, as_json: bool) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="crayon-bench-") as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or NAMES:
            started = time.perf_counter()
            print(f"{name}: {importlib.import_module(f'benchmarks.{name}').__doc__}", file=sys.stderr)
            for row in importlib.import_module(f"benchmarks.{name}").run(folder):
                print(f"  {row.what}: {row.measured}", file=sys.stderr, flush=True)
                rows.append(row)
            print(f"  ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [r.to_dict() for r in rows]}, indent=1))
    else:
        print(f"\n{machine()}\n\n{render(rows)}")


if __name__ == "__main__":
    main()
