"""crayon demo."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from crayon_runtime.cli.common import PATH, json_option, note, print_json, progress
from crayon_server.cli import quiet


@click.command()
@click.option(
    "--out", type=PATH, default=Path("demo"), show_default=True, help="The folder for everything that is made."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: 1 to train, all to answer]")
@json_option
def demo(out: Path, threads: int | None, as_json: bool) -> None:
    """Show how ten examples change a device: two to four minutes; ends with an HTML report.

    A small model is exported to int4, a pool of LoRAs is built and served on this machine beside a larger model, and three users customize
    with ten examples each; what their devices cannot answer then, they ask the larger one. An earlier demo in the same folder is replaced.
    """
    from crayon_server.demo.story import PAGE, Settings, run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: its processes end with it
    with quiet():
        report = run(out, Settings.with_threads(threads), say=note, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(f"\n{report.to_text()}\n\nreport: {(out / PAGE).resolve()}")
