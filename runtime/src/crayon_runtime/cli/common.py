"""What all verbs share: the `--json` option, progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from crayon_runtime.backends import NAMES

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
"""The type of a path argument. Whether it exists is for the library to say."""


def with_options(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """A command with options that several share, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def backend_option(command: Command) -> Command:
    """`--backend`: what computes."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", *NAMES]),
        default="auto",
        show_default=True,
        help="What computes; auto: the faster one here.",
    )(command)


def json_option(command: Command) -> Command:
    """`--json`, as the parameter `as_json`: one JSON object on stdout, and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def print_json(value: dict[str, Any]) -> None:
    """Print an object of plain values, structs, dataclasses and paths. Numbers that are not finite become null."""
    click.echo(msgspec.json.encode(value, enc_hook=str))


def print_text(text: str) -> None:
    """The result, where it is not printed as JSON, on stdout."""
    click.echo(text)


def note(text: str) -> None:
    """What is not the result, on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress(label: str, total: int | None, *, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; nothing where that is not a terminal.

    Args:
        total: how much there is to do; None: unknown.
        unit: what is counted; "bytes" are shown as MB and GB.

    Yields:
        A function to call with the amount done since the last call.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    )
    columns = [TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn()]
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on stdout; those of numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [all(_is_number(cell) for cell in column) for column in zip(*table[1:], strict=True)]
    for row in table:
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right or [False] * len(widths), strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def size_text(size: int) -> str:
    """Bytes as a person reads them: "4.1 GB", in powers of 1000."""
    if size < 1000:
        return f"{size} B"
    amount = float(size)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 999.95 or unit == "GB":
            break
    return f"{amount:.1f} {unit}"
