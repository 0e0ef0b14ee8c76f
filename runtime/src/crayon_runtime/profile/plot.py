"""Plots as SVG that stands in a page: lines, bars, and nothing that is fetched or run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 544, 36, 252
_COLORS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be123c", "#475569")


def lines(
    title: str, series: Mapping[str, Points], x: str, y: str, *, logarithmic: bool = False, dots: bool = True
) -> str:
    """Curves of named points, with a legend.

    Args:
        x, y: what the axes are.
        logarithmic: both axes; all numbers must be positive.
        dots: a mark on each point.
    """

    def scaled(value: float) -> float:
        return math.log10(value) if logarithmic else value

    known = {name: [(scaled(a), scaled(b)) for a, b in points] for name, points in series.items() if points}
    xs, ys = ([point[i] for points in known.values() for point in points] for i in (0, 1))
    (x0, x1), (y0, y1) = _span(xs), _span(ys if logarithmic else [0.0, *ys])

    def at(a: float, b: float) -> tuple[float, float]:
        across = (a - x0) / (x1 - x0)
        up = (b - y0) / (y1 - y0)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [_axes((x0, x1), (y0, y1), x, y, logarithmic)]
    for i, (name, points) in enumerate(known.items()):
        color = _COLORS[i % len(_COLORS)]
        places = [at(*point) for point in sorted(points)]
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{corners}"/>')
        if dots or len(places) == 1:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in places]
        parts.append(_text(_RIGHT, _TOP + 14 * (i + 1), name, anchor="end", fill=color))
    return _svg(title, parts, _HEIGHT)


def histogram(title: str, values: Sequence[float], x: str, bins: int = 40) -> str:
    """How often values fall into bins of one width, up to the 99.5th percent; those above are in the last."""
    ordered = sorted(values)
    low, high = ordered[0], max(ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))], ordered[0] * 1.001)
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    most, width = max(counts), (_RIGHT - _LEFT) / bins
    parts = [_axes((low, high), (0, most), x, "tokens", False)]
    for i, count in enumerate(counts):
        tall = count / most * (_BOTTOM - _TOP)
        parts.append(
            f'<rect x="{_LEFT + i * width:.1f}" y="{_BOTTOM - tall:.1f}" width="{width * 0.9:.1f}" height="{tall:.1f}" fill="{_COLORS[0]}"/>'
        )
    return _svg(title, parts, _HEIGHT)


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """A horizontal bar for each name."""
    most = max(values.values(), default=0.0) or 1.0
    left, step = 210, 22
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y = _TOP + i * step
        wide = value / most * (_RIGHT - left - 80)
        parts += [
            _text(left - 8, y + 13, name, anchor="end"),
            f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="{step - 6}" fill="{_COLORS[0]}"/>',
            _text(left + wide + 6, y + 13, f"{value:.3g} {unit}"),
        ]
    return _svg(title, parts, _TOP + step * len(values) + 12)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) * 0.1 - 0.1, high + abs(high) * 0.1 + 0.1)


def _axes(xs: tuple[float, float], ys: tuple[float, float], x: str, y: str, logarithmic: bool) -> str:
    parts = []
    for i in range(6):
        across, up = _LEFT + i / 5 * (_RIGHT - _LEFT), _BOTTOM - i / 5 * (_BOTTOM - _TOP)
        a, b = (low + i / 5 * (high - low) for low, high in (xs, ys))
        parts += [
            f'<path d="M{across:.1f} {_TOP}V{_BOTTOM}M{_LEFT} {up:.1f}H{_RIGHT}" stroke="#ddd"/>',
            _text(across, _BOTTOM + 16, _tick(a, logarithmic), anchor="middle"),
            _text(_LEFT - 6, up + 4, _tick(b, logarithmic), anchor="end"),
        ]
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, x, anchor="middle"))
    parts.append(_text(8, _TOP - 8, y))
    return "".join(parts)


def _tick(value: float, logarithmic: bool) -> str:
    return f"{10**value if logarithmic else value:.3g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" font-family="sans-serif" font-size="11">'
        f"<title>{escape(title)}</title>"
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#fff"/>{_text(_WIDTH / 2, 16, title, anchor="middle")}{"".join(parts)}</svg>'
    )
