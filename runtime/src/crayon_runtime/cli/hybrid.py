"""Hybrid answers on the command line: the options that name a server and a policy, and how an answer of either side is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from crayon_runtime.cli.common import PATH, Command, note, with_options

if TYPE_CHECKING:
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import Generation
    from crayon_runtime.routing import Answer, AnswerStream, Router

POLICIES = ("calibrated", "early", "confidence", "paper", "always", "never")


def hybrid_options(command: Command) -> Command:
    """Who answers: the options that `run` and `chat` share."""
    options = [
        click.option("--server", metavar="URL", help="A server LLM, asked for what the device should not answer."),
        click.option("--server-key-file", type=PATH, help="A file with the key that it asks for."),
        click.option("--server-model", metavar="NAME", help="Which of its models.  [default: default]"),
        click.option(
            "--plain-http", is_flag=True, help="Allow http to another machine: everybody on the way can read."
        ),
        click.option("--policy", type=click.Choice(POLICIES), help="What decides.  [default: calibrated, if it can]"),
        click.option(
            "--threshold", type=float, help="Below this score the server is asked, instead of the policy's own."
        ),
        click.option("--rules", type=PATH, help="A TOML file of what may be sent, and what is redacted before."),
        click.option("--offline", is_flag=True, help="Decide, but send nothing."),
    ]
    return with_options(command, options)


@dataclass(frozen=True)
class Hybrid:
    """What was said of who answers. The fields are the parameters of `hybrid_options`."""

    server: str | None
    server_key_file: Path | None
    server_model: str | None
    plain_http: bool
    policy: str | None
    threshold: float | None
    rules: Path | None
    offline: bool

    @classmethod
    def take(cls, options: dict[str, Any]) -> Hybrid | None:
        """Take these options out of all; None if none was given, and the device answers as ever.

        Raises:
            click.UsageError: some make no sense together.
        """
        said = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        for name in ("server_key_file", "server_model", "plain_http", "rules"):
            if getattr(said, name) and said.server is None:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --server")
        if said.threshold is not None and said.policy in ("always", "never"):
            raise click.UsageError(f"the policy {said.policy!r} has no threshold")
        asked = said.server is not None or said.policy is not None or said.threshold is not None or said.offline
        return said if asked else None

    @contextmanager
    def router(self, engine: Engine, bundle: Path) -> Iterator[Router]:
        """A router for an engine with its adapter, and the connection to the server while it is needed.

        Raises:
            InvalidInput: the server, the rules or the policy cannot be used.
        """
        from crayon_runtime.cli.customize import read_key
        from crayon_runtime.routing import Router, Rules, SentLog, ServerLLM, sent_log_path

        rules = Rules.read(self.rules) if self.rules is not None else None
        router = Router(engine, policy=self._policy(engine))
        for line in router.known(engine.present_adapter).notes:
            note(line)
        if self.server is None:
            yield router
            return
        key = read_key(self.server_key_file)
        model = self.server_model or "default"
        with ServerLLM(self.server, api_key=key, model=model, plain_http=self.plain_http) as server:
            if not self.offline:
                router.server = server
            router.rules, router.log = rules, SentLog(sent_log_path(bundle))
            yield router

    def _policy(self, engine: Engine) -> Any:
        """The policy that was asked for: its name, or what its threshold makes of it."""
        if self.threshold is None:
            return self.policy
        from crayon_runtime.routing import Router
        from crayon_runtime.routing.policies import paper

        if self.policy == "paper":  # which needs nothing but a threshold
            return paper(self.threshold)
        return msgspec.structs.replace(Router(engine, policy=self.policy).policy, threshold=self.threshold)


def show(stream: AnswerStream, *, live: bool) -> Answer:
    """Write an answer to stdout.

    Args:
        live: while it comes, drafts of the device included, for somebody who watches; otherwise when it is there.
    """
    drafted, source = False, "device"
    for part in stream:
        if not live:
            continue
        if part.draft:
            drafted = True
            _write(part.text)
        elif part.source == "device" and source == "device":
            if not drafted:
                _write(part.text)
            drafted = False  # what was a draft has come again, and is the answer
        else:
            if part.source != source:
                _write("\n" if drafted or source == "server" else "")
                note("the server broke off; the device:" if source == "server" else "the server:")
                source, drafted = part.source, False
            _write(part.text)
    click.echo("" if live else stream.answer.text)
    return stream.answer


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def route_text(answer: Answer) -> str:
    """Who answered, and why, in a line."""
    who = "the device, as a fallback" if answer.fallback else f"the {answer.route}"
    sent = f"; {answer.sent_bytes} bytes sent" if answer.sent_bytes else ""
    return f"answered by {who}: {answer.reason} ({answer.policy}){sent}"


def answer_facts(answer: Answer, generation_facts: Callable[[Generation], dict[str, Any]]) -> dict[str, Any]:
    """Every field of an answer, for JSON."""
    values = {field.name: getattr(answer, field.name) for field in fields(answer)}
    return values | {"generation": None if answer.generation is None else generation_facts(answer.generation)}
