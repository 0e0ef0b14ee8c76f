"""The demo's report as one self-contained HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING

from crayon_runtime.cli.common import size_text
from crayon_server.demo.device import MODELS
from crayon_server.demo.report import pool_has

if TYPE_CHECKING:
    from crayon_runtime.pool import Pool
    from crayon_server.demo.device import Model
    from crayon_server.demo.report import DemoReport, Person

BAR_HEIGHT, BAR_GAP = 24, 8
WIDTH = 300
"""Of the longest bar."""
LABELS: dict[Model, str] = {"before": "before", "after": "after", "oracle": "oracle"}
PARTS = {
    "pool": "fetch the pool's description and indicators",
    "embed": "embed ten examples, and score them with the base",
    "alpha": "compute alpha",
    "request": "request, until the adapter begins to come: the service blends, signs and packs it",
    "download": "download",
    "verify": "verify signature and hashes, unpack",
    "prove": "prove it on the examples",
    "swap": "write it to the disk and swap",
}
"""What customizing consists of, in the order in which it happens."""


@dataclass(frozen=True)
class Bar:
    """A stretch of a chart, in its units."""

    label: str
    kind: str
    """How it is coloured."""
    x: float
    y: float
    width: float
    text: str


def render(report: DemoReport, pool: Pool) -> str:
    """The page.

    Args:
        pool: that was built, for the map of its clusters.
    """
    import jinja2

    from crayon_server.pool.inspect import cluster_map

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    environment.filters["size"] = size_text
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    longest = max(person.total_seconds for person in report.people)
    return environment.from_string(template).render(
        report=report,
        people=report.people,
        device=report.device,
        pool=report.pool,
        pool_has=pool_has,
        map=cluster_map(pool, [(person.name, person.point) for person in report.people]),
        charts=[_accuracy(person) for person in report.people],
        alphas=[_alpha(person, report.pool.typical) for person in report.people],
        latencies=[_latency(person, longest) for person in report.people],
        parts=_parts(report.people),
        bar_height=BAR_HEIGHT,
        width=WIDTH,
        accuracy_height=len(MODELS) * (BAR_HEIGHT + BAR_GAP) + 18,
        alpha_height=report.pool.adapters * 15,
    )


def _accuracy(person: Person) -> list[Bar]:
    bars = []
    for i, model in enumerate(MODELS):
        share = person.scores[model].exact_match
        bars.append(Bar(LABELS[model], model, 0, i * (BAR_HEIGHT + BAR_GAP), WIDTH * share, f"{share:.0%}"))
    return bars


def _alpha(person: Person, typical: list[str]) -> list[Bar]:
    """One bar a cluster, in the colours of the map."""
    from crayon_server.pool.inspect import cluster_color

    count, largest = len(person.alpha), max(map(abs, person.alpha)) or 1.0
    return [
        Bar(f"{n}: {typical[n]}", cluster_color(n, count), 0, n * 15, 180 * abs(weight) / largest, f"{weight:.3f}")
        for n, weight in enumerate(person.alpha)
    ]


def _parts(people: list[Person]) -> list[tuple[str, str, list[float]]]:
    """Of everything that customizing consists of: its name, what it is, and the milliseconds of each person."""
    return [
        (part, what, [1e3 * person.seconds.get(part, 0.0) for person in people])
        for part, what in PARTS.items()
        if any(part in person.seconds for person in people)
    ]


def _latency(person: Person, longest: float) -> list[Bar]:
    """The parts of a customization side by side; the longest customization of all fills the width."""
    parts = [part for part, *_ in _parts([person])]
    widths = [720 * person.seconds[part] / longest for part in parts]
    starts = [0.0, *accumulate(widths)]
    return [
        Bar(part, part, x, 0, width, f"{1e3 * person.seconds[part]:.1f} ms")
        for part, x, width in zip(parts, starts, widths, strict=False)
    ]
