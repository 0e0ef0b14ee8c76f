"""The `crayon` command: its verbs come from the entry points of every installed part, and are imported only when they run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import click

from crayon_runtime._version import __version__
from crayon_runtime.errors import CrayonError, MissingExtra

GROUP = "crayon.commands"


def main(args: Sequence[str] | None = None, verbs: Iterable[EntryPoint] | None = None) -> int:
    """Run one command line.

    Args:
        args: without the program's name; None: those of this process.
        verbs: the entry points of the verbs; None: those of the installed packages.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    group = Verbs(entry_points(group=GROUP) if verbs is None else verbs)
    try:
        code = group.main(args, prog_name="crayon", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except CrayonError as e:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {e}", err=True)
        return 1
    return code if isinstance(code, int) else 0


class Verbs(click.Group):
    """A group whose verbs are entry points: `name = "package.module:function [extra]"`."""

    def __init__(self, verbs: Iterable[EntryPoint]) -> None:
        super().__init__(
            "crayon",
            help="Put a customized LLM on a phone or an ARM board.",
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
            no_args_is_help=True,
        )
        self._verbs = {verb.name: verb for verb in verbs}
        click.version_option(__version__, message="crayon %(version)s")(self)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        verb = self._verbs.get(cmd_name)
        if verb is None:
            return None
        try:
            command = verb.load()
        except ModuleNotFoundError as e:
            _missing(verb, e)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as e:  # verbs import what is heavy when they need it
            verb = self._verbs.get(ctx.invoked_subcommand or "")
            if verb is None:
                raise
            _missing(verb, e)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(verb)) for name, verb in sorted(self._verbs.items())])


def _missing(verb: EntryPoint, error: ModuleNotFoundError) -> NoReturn:
    """Say which extra to install, unless the missing module is one of ours that should be there."""
    package = (error.name or "").partition(".")[0]
    ours = package.startswith("crayon_") and find_spec(package) is not None
    if ours or not verb.extras:
        raise error
    raise MissingExtra(verb.extras[0], f"crayon {verb.name}") from error


def _summary(verb: EntryPoint) -> str:
    """The first line of a verb's docstring, read from its source: importing it may take seconds, or packages that are not here."""
    source = _source(verb.module)
    if source is None:
        return f"(not installed: pip install 'crayon-edge[{verb.extras[0]}]')" if verb.extras else ""
    for node in ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == verb.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
    return ""


def _source(module: str) -> Path | None:
    package, *rest = module.split(".")
    spec = find_spec(package)  # of a top-level package: finds it, executes nothing
    for root in (spec and spec.submodule_search_locations) or []:
        path = Path(root, *rest)
        for source in (path.with_suffix(".py"), path / "__init__.py"):
            if source.is_file():
                return source
    return None
