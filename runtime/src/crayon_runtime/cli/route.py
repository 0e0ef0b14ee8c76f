"""crayon route: when a customized model asks the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.cli.common import (
    PATH,
    backend_option,
    json_option,
    note,
    print_json,
    print_table,
    print_text,
    progress,
)
from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    from crayon_runtime.routing.calibration import Calibration
    from crayon_runtime.routing.policies import Policy


@click.group()
def route() -> None:
    """Calibrate and show when a customized model asks the server LLM, and read what was sent."""


@route.command()
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help='Lines of {"prompt"}, with a right "completion", or "correct".')
@click.option("--budget", metavar="SHARE", type=float, help="The share of queries that may go to the server, 0 to 1.")
@click.option(
    "--target-accuracy", metavar="SHARE", type=float, help="The share of answers that shall be right; needs labels."
)
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--plot", metavar="FILE", type=PATH, help="Draw the cost-quality curve, as SVG; needs labels.")
@backend_option
@click.option("--threads", type=click.IntRange(min=1), help="Cores to compute on.  [default: all physical ones]")
@json_option
def calibrate(
    bundle: Path,
    data: Path,
    budget: float | None,
    target_accuracy: float | None,
    max_new_tokens: int,
    plot: Path | None,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find out when to ask the server, and keep it with the adapter.

    The customized model answers every prompt of the data. An answer is right if it is the line's "completion", or if the line says that it
    is "correct"; "server_correct" says the same of the server's answer, which otherwise counts as right. Without labels the least sure
    answers, and those least like the user's own examples, are within the budget. Nothing is sent to any server.
    """
    from crayon_runtime.customized import ADAPTER, state_folder
    from crayon_runtime.engine import Engine
    from crayon_runtime.files import atomic_file
    from crayon_runtime.routing.calibrate import calibrate as run
    from crayon_runtime.routing.calibrate import read_queries
    from crayon_runtime.routing.plot import svg

    if (budget is None) == (target_accuracy is None):
        raise click.UsageError("give either --budget or --target-accuracy")
    queries = read_queries(data)
    folder = state_folder(bundle)
    adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else None
    with (
        Engine.load(bundle, backend=backend, threads=threads, adapter=adapter) as engine,
        progress("answering", len(queries), unit="queries") as on_query,
    ):
        made = run(
            engine,
            queries,
            folder,
            budget=budget,
            target_accuracy=target_accuracy,
            max_new_tokens=max_new_tokens,
            on_query=on_query,
        )
    drawn = svg(made) if plot is not None else None
    made.write(folder)
    if plot is not None and drawn is not None:
        with atomic_file(plot) as file:
            file.write(drawn.encode())
    if as_json:
        print_json(_facts(made))
    else:
        _show(made)


@route.command("show")
@click.argument("bundle", type=PATH)
@json_option
def show_route(bundle: Path, as_json: bool) -> None:
    """Show what decides for a customized model: what its answers are compared with, and its policies."""
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.customized import ADAPTER, state_folder
    from crayon_runtime.routing.router import read_known

    folder = state_folder(bundle)
    if not (folder / ADAPTER).is_dir():
        raise InvalidInput("the model is not customized", where=folder, do="run `crayon customize` first")
    adapter = Bundle.open(folder / ADAPTER)
    known = read_known(adapter, folder, Bundle.open(bundle).model.tap.size)
    for line in known.notes:
        note(line)
    prototypes = adapter.as_adapter.prototypes
    examples = len(known.reference.answers) - known.reference.prototypes
    made = known.calibration
    if as_json:
        facts: dict[str, Any] = {
            "prototypes": prototypes.count if prototypes else 0,
            "prototypes_model": prototypes.model if prototypes else None,
            "examples": examples,
            "policy": known.policy().name,
            "policies": [*known.policies.values()],
            "calibration": _facts(made) if made else None,
            "notes": known.notes,
        }
        print_json(facts)
        return
    of = f" of {prototypes.model}" if prototypes else ""
    print_text(f"compared with: {known.reference.prototypes} prototypes{of}, {examples} examples of the user's own")
    if made is None:
        print_text("not calibrated: the thresholds are those of the user's own examples; see `crayon route calibrate`")
        _print_policies([*known.policies.values()])
    else:
        _show(made)
    print_text(f"decides, unless another one is chosen: {known.policy().name}")


@route.command()
@click.argument("bundle", type=PATH)
@json_option
def log(bundle: Path, as_json: bool) -> None:
    """Show what was sent to a server, the oldest first: every query as it was sent, and what came of it."""
    from crayon_runtime.routing.sent import SentLog, sent_log_path

    path = sent_log_path(bundle)
    sent = SentLog(path).read()
    if as_json:
        print_json({"path": path, "sent": sent})
        return
    if not sent:
        print_text(f"nothing was sent ({path})")
        return
    print_table(
        ["time", "server", "bytes", "outcome", "query"],
        [
            [entry.time[:19], entry.server, str(entry.bytes), _plain(entry.outcome), _plain(entry.query)]
            for entry in sent
        ],
    )
    note(f"{len(sent)} queries, {sum(entry.bytes for entry in sent)} bytes; the file is {path}")


def _plain(text: str) -> str:
    """In one line, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _facts(made: Calibration) -> dict[str, Any]:
    policy = made.policy("calibrated")
    return {
        "n": made.n,
        "labelled": made.labelled,
        "budget": made.budget,
        "target_accuracy": made.target_accuracy,
        "threshold": policy.threshold if policy else None,
        "policies": made.policies,
        "curve": made.curve,
    }


def _show(made: Calibration) -> None:
    asked = (
        f"a budget of {made.budget:.0%}" if made.budget is not None else f"an accuracy of {made.target_accuracy:.0%}"
    )
    labels = "labelled" if made.labelled else "without labels"
    print_text(f"calibrated for {asked} with {made.n} queries, {labels}")
    _print_policies(made.policies)
    if made.labelled:
        step = max((len(made.curve) - 1) // 10, 1)
        print_table(
            ["calls", "right", "threshold"],
            [[f"{p.calls:.3f}", f"{p.accuracy:.3f}", f"{p.threshold:.3f}"] for p in made.curve[::step]],
        )


def _print_policies(policies: list[Policy]) -> None:
    print_table(
        ["policy", "threshold", "after", "score"],
        [[p.name, f"{p.threshold:.3f}" if p.weights else "-", _after(p), _formula(p)] for p in policies],
    )


def _after(policy: Policy) -> str:
    if not policy.weights:
        return "-"
    return "the answer" if policy.after is None else f"{policy.after} tokens"


def _formula(policy: Policy) -> str:
    if not policy.weights:
        return "-"
    terms = " ".join(f"{weight:+.3g} {name}" for name, weight in policy.weights.items())
    total = f"{policy.bias:.3g} {terms}" if policy.bias else terms
    return f"sigmoid({total})" if policy.logistic else total
