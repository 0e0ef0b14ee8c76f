"""The cost-quality curve of a calibration, drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.calibration import Calibration, Point

_WIDTH, _HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 536, 40, 300


def svg(calibration: Calibration) -> str:
    """Share of right answers over the share of calls: of the calibrated policy, of calls at random, and where the threshold is.

    Raises:
        InvalidInput: it was made without labels, so there is no accuracy to draw.
    """
    known = [(point.calls, point.accuracy) for point in calibration.curve if point.accuracy is not None]
    if not known:
        raise InvalidInput(
            "the calibration knows no accuracy: its data had no labels", where="plot", do="calibrate with labelled data"
        )
    values = [accuracy for _, accuracy in known]
    low, high = max(min(values) - 0.02, 0.0), min(max(values) + 0.02, 1.0)

    def at(calls: float, accuracy: float) -> tuple[float, float]:
        share = (accuracy - low) / (high - low)
        return _LEFT + calls * (_RIGHT - _LEFT), _BOTTOM - share * (_BOTTOM - _TOP)

    def line(points: Sequence[tuple[float, float]], style: str) -> str:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        return f'<polyline fill="none" {style} points="{corners}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-family="sans-serif" font-size="12">',
        f"<title>Cost and quality of {calibration.n} answers</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _grid(low, high),
        line([known[0], known[-1]], 'stroke="#888" stroke-width="1.5" stroke-dasharray="5 4"'),
        line(known, 'stroke="#1f5fa8" stroke-width="2.5"'),
    ]
    chosen = _chosen(calibration)
    if chosen is not None and chosen.accuracy is not None:
        x, y = at(chosen.calls, chosen.accuracy)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#c2410c"/>')
        label = f"threshold {chosen.threshold:.3f}: {chosen.calls:.0%} calls"
        left = chosen.calls < 0.5
        parts.append(_text(x + (9 if left else -9), y + 16, label, anchor="start" if left else "end", fill="#c2410c"))
    parts += [
        _text(_LEFT, 22, f"share of right answers, {calibration.n} queries"),
        _text(_RIGHT, 22, "blue: calibrated; dashed: calls at random", anchor="end"),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 16, "share of queries that go to the server", anchor="middle"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(low: float, high: float) -> str:
    lines = []
    for i in range(6):
        x = _LEFT + i / 5 * (_RIGHT - _LEFT)
        y = _BOTTOM - i / 5 * (_BOTTOM - _TOP)
        lines.append(f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#ddd"/>')
        lines.append(_text(x, _BOTTOM + 18, f"{i / 5:.0%}", anchor="middle"))
        lines.append(_text(_LEFT - 8, y + 4, f"{low + i / 5 * (high - low):.2f}", anchor="end"))
    return "\n".join(lines)


def _chosen(calibration: Calibration) -> Point | None:
    """The point of the curve that is nearest to the threshold."""
    policy = calibration.policy("calibrated")
    if policy is None:
        return None
    return min(calibration.curve, key=lambda point: abs(point.threshold - policy.threshold))


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{text}</text>'
