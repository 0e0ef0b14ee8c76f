"""The cost-quality curves of the benchmark, drawn: how often the answer is right, by the share of queries that go to the server."""

from __future__ import annotations

from typing import Any

from crayon_server import svg

DRAWN: dict[str, dict[str, Any]] = {
    "oracle": {"color": "0.6", "linestyle": "--"},
    "calibrated": {"color": "C0", "linewidth": 2},
    "early": {"color": "C1"},
    "log_probability": {"color": "C2"},
    "prototypes_max": {"color": "C4"},
    "prototypes_mean": {"color": "C3"},
    "random": {"color": "0.6", "linestyle": ":"},
}
"""The rows, the best first."""
TITLES = {"useful": "useful: the right call in any convention", "oracle_server": "exact, against a server that is told"}
PAPER = "prototypes_mean (the paper's)"


def draw(result: dict[str, Any]) -> bytes:
    """An SVG of what `run` gives; the same for the same numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        curves = result["curves"][measure]
        for name, style in DRAWN.items():
            label = PAPER if name == "prototypes_mean" else name
            axes.plot(curves["calls"], curves[name], label=label, **style)
        axes.set(title=title, xlabel="share of queries to the server", ylabel="share of right answers")
        axes.grid(color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return svg.render(figure)
