"""crayon demo."""

from __future__ import annotations

from pathlib import Path

import click

from crayon_runtime.cli.common import PATH, json_option, note, print_json
from crayon_server.cli import quiet


@click.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="The folder for bundle and report.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: 1 to train, all to answer]")
@json_option
def demo(out: Path, threads: int | None, as_json: bool) -> None:
    """Show the whole story on the embedded model; ends with an HTML report."""
    from crayon_server.demo import run

    with quiet():
        report = run(out, threads=threads, say=note)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(f"{report.to_text()}\n\nreport: {(out / 'report.html').resolve()}")
