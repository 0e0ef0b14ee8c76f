"""A profile as one HTML page that needs nothing else."""

from __future__ import annotations

from collections import defaultdict
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING

from crayon_runtime.profile import plot

if TYPE_CHECKING:
    from crayon_runtime.profile.document import Profile
    from crayon_runtime.profile.records import Sample, Test

_TOP = 15
"""Operators that are shown by themselves."""


def html(profile: Profile) -> str:
    """The page: a table of the tests, plots, and what is absent."""
    import jinja2

    source = resources.files("crayon_runtime.profile").joinpath("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(
        header=profile.header,
        tests=profile.tests,
        kinds=profile.operator_kinds,
        long=profile.long_run,
        absent=profile.absent,
        plots=plots(profile),
    )


def plots(profile: Profile) -> list[str]:
    """SVG of all that there are numbers for."""
    return [drawn for draw in (_context, _latency, _memory, _heat, _operators, _roofline) for drawn in draw(profile)]


def _context(profile: Profile) -> list[str]:
    decodes = [test for test in profile.tests if test.test == "decode"]
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for test in decodes:
        series[_setting(test)].append((test.n_depth, test.avg_ts or 0.0))
    return [plot.lines("Decode against context", series, "tokens before", "tokens a second")] if decodes else []


def _latency(profile: Profile) -> list[str]:
    decode = next((test for test in profile.tests if test.test == "decode" and test.token_ns), None)
    if decode is None:
        return []
    times = [ns / 1e6 for ns in chain.from_iterable(decode.token_ns)]
    return [plot.histogram(f"Time of a token: {decode.label}", times, "ms")]


def _memory(profile: Profile) -> list[str]:
    seen = [sample for sample in profile.samples if sample.phase != "long"]
    first = [sample for sample in seen if sample.process == seen[0].process]
    series = {
        name: [(s.t_ns / 1e9, value / 1e6) for s in first if (value := getattr(s, field)) is not None]
        for name, field in (("resident", "rss_bytes"), ("proportional", "pss_bytes"), ("of the bundle", "mapped_bytes"))
    }
    return [plot.lines("Memory of the first process", series, "seconds", "MB")] if any(series.values()) else []


def _heat(profile: Profile) -> list[str]:
    long = [sample for sample in profile.samples if sample.phase == "long"]
    drawn = []
    speeds = [(s.t_ns / 1e9, s.avg_ts) for s in long if s.avg_ts is not None]
    if speeds:
        drawn.append(plot.lines("The long run", {"decode": speeds}, "seconds", "tokens a second", dots=False))
    temperatures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample in long:
        for name, celsius in sample.temperature_c.items():
            temperatures[name].append((sample.t_ns / 1e9, celsius))
    if temperatures:
        drawn.append(plot.lines("Temperature", temperatures, "seconds", "°C", dots=False))
    clocks = [(s.t_ns / 1e9, _mean_clock(s)) for s in long if s.frequency_hz]
    if clocks:
        drawn.append(plot.lines("Clock, mean over cores", {"clock": clocks}, "seconds", "GHz", dots=False))
    return drawn


def _operators(profile: Profile) -> list[str]:
    kinds = {kind.kind: kind.p50_ns / 1e3 for kind in profile.operator_kinds}
    ordered = sorted(profile.operators, key=lambda operator: -operator.p50_ns)[:_TOP]
    single = {(operator.module or operator.event_name)[-34:]: operator.p50_ns / 1e3 for operator in ordered}
    if not kinds:
        return []
    return [plot.bars("Operators of a token, by kind", kinds, "µs"), plot.bars("The slowest operators", single, "µs")]


def _roofline(profile: Profile) -> list[str]:
    """Operations a second over operations for each byte of weights, under what memory and a float32 matrix product allow."""
    header, tests = profile.header, profile.tests
    reads = [test.nbytes * 1e9 / test.avg_ns for test in tests if test.test == "control_read"]
    products = [test.nbytes * 1e9 / test.avg_ns for test in tests if test.test == "control_matmul"]
    if not reads or not products:
        return []
    bandwidth, peak = max(reads), max(products)
    once = header.operations / header.read_bytes
    points = {
        test.label: [(once * max(test.n_prompt, 1), header.operations * test.avg_ts)]
        for test in tests
        if test.test in ("prefill", "decode") and test.avg_ts
    }
    intensities = [once, *(x for point in points.values() for x, _ in point), peak / bandwidth]
    left, right = min(intensities) / 2, max(intensities) * 2
    roof = [(left, left * bandwidth), (peak / bandwidth, peak), (right, peak)]
    title = "Roofline: memory, and a float32 product by numpy"
    return [
        plot.lines(
            title,
            {"roof": roof, **points},
            "operations for each byte of weights",
            "operations a second",
            logarithmic=True,
        )
    ]


def _setting(test: Test) -> str:
    threads = f"{test.n_threads} threads" if test.n_threads else "threads: backend's choice"
    return threads + (f", cores {test.cpu_mask}" if test.cpu_mask != "0x0" else "")


def _mean_clock(sample: Sample) -> float:
    return sum(sample.frequency_hz) / len(sample.frequency_hz) / 1e9
