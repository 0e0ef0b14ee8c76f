"""The demo's report as one self-contained HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING

from crayon_runtime.cli.common import size_text
from crayon_server.demo.device import MODELS
from crayon_server.demo.report import MEASURES, bytes_down, bytes_up, pool_has
from crayon_server.demo.report import PARTS as QUERY_PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crayon_runtime.pool import Pool
    from crayon_server.demo.device import Model
    from crayon_server.demo.report import Asked, Curve, DemoReport, Measure, Person, QueryPart

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


QUERIES: dict[QueryPart, str] = {
    "in_task": "what the device is customized for",
    "other_domain": "other domains, which it knows",
    "server_only": "domains that only the server LLM knows",
}
TITLES: dict[Measure, str] = {
    "useful": "Useful: the right call, in any convention",
    "exact": "Exact: the right call, in the user's convention",
}
SHOWN = 2
"""Queries of each part of each user that are shown at once."""
LEFT, RIGHT, TOP, BOTTOM = 46, 404, 14, 234
"""Where the axes of a cost-quality curve lie."""


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


@dataclass(frozen=True)
class Plot:
    """A cost-quality curve as SVG has it.

    Attributes:
        policy, oracle, random: points of lines.
        point: the policy as it is; `percent` of its answers are right, `label` says more.
        said: all of it in a sentence.
    """

    title: str
    policy: str
    oracle: str
    random: str
    point: tuple[float, float]
    label: str
    percent: str
    said: str
    apgr: float | None


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
        curves=report.routing.curves,
        plots=[_plot(measure, report.routing.curves[measure]) for measure in MEASURES],
        parts_asked=_parts_asked([query for person in report.people for query in person.asked]),
        routing=report.routing,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        first=[_first(person.asked) for person in report.people],
        all_asked=[query for person in report.people for query in person.asked],
        all_chat=[message for person in report.people for message in person.chat],
        bytes_up=bytes_up,
        bytes_down=bytes_down,
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


def _plot(measure: Measure, curve: Curve) -> Plot:
    device, server = curve.device, curve.server
    point = (curve.policy_calls, curve.policy_accuracy)
    return Plot(
        title=TITLES[measure],
        policy=_line(curve.calls, curve.accuracy),
        oracle=_line(curve.oracle_calls, curve.oracle_accuracy),
        random=_line([0, 1], [device, server]),
        point=_place(*point),
        label=f"{point[1]:.0%} right, {point[0]:.0%} to the server",
        percent=f"{point[1]:.0%}",
        said=f"Without any call {device:.0%} of the answers are right, with nothing but calls {server:.0%}; "
        f"with the {point[0]:.0%} of calls that the policy makes, {point[1]:.0%}.",
        apgr=curve.apgr,
    )


def _place(calls: float, accuracy: float) -> tuple[float, float]:
    return round(LEFT + (RIGHT - LEFT) * calls, 1), round(BOTTOM - (BOTTOM - TOP) * accuracy, 1)


def _line(calls: Sequence[float], accuracy: Sequence[float]) -> str:
    return " ".join("{},{}".format(*_place(*point)) for point in zip(calls, accuracy, strict=True))


def _parts_asked(queries: Sequence[Asked]) -> list[tuple[str, int, float, list[tuple[float, float, float]]]]:
    """Of each part, and of all: what it is, the number of queries, the share that went to the server, and by measure the shares of right
    answers of device, server LLM and both."""
    parts = [(QUERIES[part], [query for query in queries if query.part == part]) for part in QUERY_PARTS]
    return [
        (
            what,
            len(own),
            fmean(query.route == "server" for query in own),
            [_right(own, measure) for measure in MEASURES],
        )
        for what, own in [*parts, ("all", queries)]
        if own
    ]


def _right(queries: Sequence[Asked], measure: Measure) -> tuple[float, float, float]:
    judged = [(query.draft_is, query.by_server_is, query.shown_is) for query in queries]
    device, server, both = (fmean(getattr(one, measure) for one in of_one) for of_one in zip(*judged, strict=True))
    return device, server, both


def _first(queries: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The first of each part, and all others."""
    first = [query for part in QUERY_PARTS for query in [q for q in queries if q.part == part][:SHOWN]]
    return first, [query for query in queries if query not in first]
