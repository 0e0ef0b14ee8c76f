"""The demo's report as one self-contained HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from crayon_server.demo.device import BASE

if TYPE_CHECKING:
    from crayon_server.demo import DemoReport, Score

BAR_HEIGHT, BAR_GAP = 22, 8


@dataclass(frozen=True)
class Bar:
    """One row of a chart."""

    label: str
    kind: str
    """How it is coloured: "base", "own" or "other"."""
    value: float
    """0 to 1."""
    reference: float
    """The float model's value, drawn as a mark."""
    y: int


def render(report: DemoReport) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    models = [BASE, *(p.name for p in report.personas)]
    return environment.from_string(template).render(
        report=report,
        device=report.device,
        models=models,
        charts=[(p, _bars(report, p.name, models)) for p in report.personas],
        bar_height=BAR_HEIGHT,
        chart_height=len(models) * (BAR_HEIGHT + BAR_GAP) + 18,
        rows=[[_cells(report, model, p.name) for p in report.personas] for model in models],
    )


def _bars(report: DemoReport, user: str, models: list[str]) -> list[Bar]:
    order = [BASE, user, *(m for m in models if m not in (BASE, user))]
    return [
        Bar(
            label="base" if model == BASE else f"{model}'s LoRA",
            kind="base" if model == BASE else "own" if model == user else "other",
            value=report.score(model, user).exact_match,
            reference=report.score(model, user, quantized=False).exact_match,
            y=i * (BAR_HEIGHT + BAR_GAP),
        )
        for i, model in enumerate(order)
    ]


def _cells(report: DemoReport, model: str, user: str) -> tuple[Score, Score]:
    return report.score(model, user), report.score(model, user, quantized=False)
