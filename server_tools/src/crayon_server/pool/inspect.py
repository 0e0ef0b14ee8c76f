"""What is in a pool: where its clusters lie, how many texts they have, how large its LoRAs are, and how alike.

A LoRA adds s B A to a weight. Norms and similarities are those of these products, over all modules, from the small Gram matrices of the
factors: <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)). One module is in memory at a time, and no product B A ever.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crayon_runtime.errors import InvalidInput
from crayon_server.pool.indicators import normalize

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import jinja2
    import numpy.typing as npt

    from crayon_runtime.pool import Pool, TypicalText

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]

RECIPES = {
    "paper": "The Crayon paper's, as far as it is public: a text's embedding is its mean state over prompt and answer, projected by PCA; "
    "clusters are k-means of single texts.",
    "residual": "Ours for texts of which nothing is known: what a prompt does not predict of its answer's mean state (the task residual), "
    "projected by whitened PCA; clusters are k-means of single texts.",
    "groups": "Ours for texts of which the data says what belongs together: the task residual, projected by LDA between the groups; "
    "clusters are k-means of means of several texts of one group, which is what a device sends.",
    "imported": "LoRAs that were trained elsewhere, each on its own. The indicator of each is the mean of its own texts, projected.",
}
BLENDS = {
    "separate": "the A and the B of all LoRAs are summed, each for itself (the paper's)",
    "concat": "the products B A are summed, exactly",
    "svd": "the products B A are summed and cut to a rank",
}
TEXTS = 5
"""Typical texts of each cluster that are shown; a pool may have more."""
WIDTH, HEIGHT, MARGIN = 640, 440, 44
"""Of a map, in its own units."""
LARGEST, SMALLEST = 22.0, 6.0
"""Radius of the largest cluster on a map, and the least that any has."""


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows.

    Attributes:
        norms: of each LoRA, Frobenius.
        similarity: cosines between the LoRAs' products, float64 [N, N]; 0 for a LoRA that adds nothing.
        cosines: between the indicators, float64 [N, N].
        sizes: how many texts each cluster has; None: the pool does not say.
    """

    pool: Pool
    norms: list[float]
    similarity: Doubles
    cosines: Doubles
    sizes: list[int] | None

    @property
    def recipe(self) -> str:
        """In words."""
        recipe = str(self.pool.manifest.settings.get("recipe", "unknown"))
        return RECIPES.get(recipe, recipe)

    def to_dict(self) -> dict[str, Any]:
        manifest, texts = self.pool.manifest, _texts(self.pool)
        return {
            "name": manifest.name,
            "version": manifest.version,
            "serial": manifest.serial,
            "base_fingerprint": manifest.base_fingerprint,
            "rank": manifest.rank,
            "scale": manifest.scale,
            "blend": manifest.blend,
            "weighting": manifest.weighting,
            "grouped": manifest.grouped,
            "settings": manifest.settings,
            "prototypes": manifest.prototypes,
            "adapters": [
                {
                    "adapter": n,
                    "texts": self.sizes[n] if self.sizes else None,
                    "norm": self.norms[n],
                    "typical": texts[n],
                }
                for n in range(manifest.adapters)
            ],
            "similarity": self.similarity.tolist(),
            "indicator_cosines": self.cosines.tolist(),
        }


def inspect(pool: Pool) -> Inspection:
    """Measure a pool. It must have been opened with verify=True, or a NaN in it shows as one."""
    products = gram(pool)
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    lengths = np.where(norms > 0, norms, 1)
    points = pool.projection.indicators.astype(np.float64)
    return Inspection(
        pool,
        norms.tolist(),
        np.clip(products / np.outer(lengths, lengths), -1, 1),
        np.clip(points @ points.T, -1, 1),
        _sizes(pool),
    )


def gram(pool: Pool) -> Doubles:
    """<s B_i A_i, s B_j A_j> over all modules, Frobenius: float64 [N, N]."""
    count, rank = pool.manifest.adapters, pool.manifest.rank
    total = np.zeros((count, count))
    loras = [pool.lora(n) for n in range(count)]
    for module in pool.manifest.targets:
        a = np.vstack([lora[module][0] for lora in loras], dtype=np.float64)
        b = np.hstack([lora[module][1] for lora in loras], dtype=np.float64)
        total += ((b.T @ b) * (a @ a.T)).reshape(count, rank, count, rank).sum((1, 3))
    return total * pool.manifest.scale**2


def _sizes(pool: Pool) -> list[int] | None:
    """pool.json may come from anywhere, and its settings may hold anything."""
    sizes = pool.manifest.settings.get("sizes")
    if not isinstance(sizes, list) or len(sizes) != pool.manifest.adapters:
        return None
    return sizes if all(isinstance(size, int) and size >= 0 for size in sizes) and sum(sizes) else None


def _texts(pool: Pool) -> list[list[TypicalText]]:
    """The most typical texts of each cluster."""
    found: list[list[TypicalText]] = [[] for _ in range(pool.manifest.adapters)]
    for text in pool.typical():
        if len(found[text["cluster"]]) < TEXTS:
            found[text["cluster"]].append(text)
    return found


# The map


class Point(NamedTuple):
    """Something on a map, in its units."""

    x: float
    y: float
    label: str
    radius: float
    color: str
    title: str


def cluster_map(pool: Pool, extra_points: Sequence[tuple[str, npt.ArrayLike]] = ()) -> str:
    """A map of a pool's clusters as an SVG element: PCA of the indicators to two dimensions.

    Circles are clusters, their area the number of their texts; dots are typical texts; diamonds are `extra_points`.

    Args:
        extra_points: a label and z, float [k], of whatever else lies among the indicators: a user's examples, say. Only the
            direction of z counts.

    Raises:
        InvalidInput: a z has another length, or holds NaN or infinity.
    """
    axes, mean, _ = _axes(pool)
    texts = [text for own in _texts(pool) for text in own if text.get("position")]
    extra = _directions(pool, extra_points)
    points = pool.projection.indicators
    positions = np.array([text["position"] for text in texts], np.float32).reshape(-1, points.shape[1])
    everything = (np.vstack([points, normalize(positions), extra]) - mean) @ axes.T
    placed: list[list[float]] = _to_page(everything).tolist()
    count = len(points)
    sizes = _sizes(pool) or [1] * count
    clusters = [
        Point(
            placed[n][0],
            placed[n][1],
            label=str(n),
            radius=max(SMALLEST, LARGEST * (size / max(sizes)) ** 0.5),
            color=cluster_color(n, count),
            title=f"cluster {n}" + (f", {size} texts" if _sizes(pool) else ""),
        )
        for n, size in enumerate(sizes)
    ]
    dots = [
        Point(x, y, label="", radius=2.5, color=cluster_color(text["cluster"], count), title=_one_line(text))
        for (x, y), text in zip(placed[count : count + len(texts)], texts, strict=True)
    ]
    others = [
        Point(x, y, label=label, radius=7, color="currentColor", title=label)
        for (x, y), (label, _) in zip(placed[count + len(texts) :], extra_points, strict=True)
    ]
    # The largest first, so that no smaller one is under it.
    clusters.sort(key=lambda point: -point.radius)
    return _template("cluster_map.svg.j2").render(
        clusters=clusters, dots=dots, others=others, width=WIDTH, height=HEIGHT, name=pool.manifest.name
    )


def _axes(pool: Pool) -> tuple[Doubles, Doubles, float]:
    """Two axes [2, k], the mean [k], and the share of the indicators' variance that the axes show."""
    points = pool.projection.indicators.astype(np.float64)
    mean = points.mean(0)
    _, deviations, directions = np.linalg.svd(points - mean, full_matrices=False)
    axes = np.zeros((2, points.shape[1]))
    axes[: min(2, len(directions))] = directions[:2]
    total = float((deviations**2).sum())
    return axes, mean, float((deviations[:2] ** 2).sum()) / total if total else 1.0


def _directions(pool: Pool, extra_points: Sequence[tuple[str, npt.ArrayLike]]) -> Floats:
    dimensions = pool.manifest.dimensions
    rows = []
    for label, z in extra_points:
        row = np.asarray(z, np.float32)
        if row.shape != (dimensions,) or not np.isfinite(row).all():
            raise InvalidInput(f"z has shape {list(row.shape)}; {dimensions} finite numbers are needed", where=label)
        rows.append(row)
    return normalize(np.array(rows, np.float32).reshape(-1, dimensions))


def _to_page(points: Doubles) -> Doubles:
    """Both axes at one scale, in the middle of the page."""
    low, high = points.min(0), points.max(0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = (room / np.maximum(high - low, 1e-9)).min()
    placed: Doubles = (points - (low + high) / 2) * min(scale, 1e6) * [1, -1] + np.array([WIDTH, HEIGHT]) / 2
    return placed.round(1)


def cluster_color(n: int, count: int) -> str:
    """Of cluster n of `count`, in CSS."""
    return f"hsl({360 * n / count:.0f} 55% 52%)"


def _one_line(text: TypicalText) -> str:
    return f"{text['cluster']}: {text['prompt'].strip()} → {text['completion'].strip()}"


# The page


class Cell(NamedTuple):
    """Of a heat map."""

    x: int
    y: int
    color: str
    text: str
    title: str


CELL, LABELS = 30, 30
"""Of a heat map: a cell's edge, and the room for numbers beside it."""


def _heat(matrix: Doubles, what: str) -> list[Cell]:
    """Blue to -1, orange to 1, see-through at 0."""
    return [
        Cell(
            x=LABELS + j * CELL,
            y=LABELS + i * CELL,
            color=f"hsl({28 if value > 0 else 214} 80% 50% / {abs(value):.2f})",
            text=f"{value:.2f}".replace("0.", ".").replace("-.00", ".00"),
            title=f"{what} of {i} and {j}: {value:.3f}",
        )
        for i, row in enumerate(matrix.tolist())
        for j, value in enumerate(row)
    ]


def render(inspection: Inspection) -> str:
    """One self-contained HTML page: no scripts, nothing fetched. Texts are escaped."""
    pool = inspection.pool
    manifest = pool.manifest
    count = manifest.adapters
    largest = max(inspection.norms) or 1.0
    sizes = inspection.sizes
    typical = _texts(pool)
    others = np.where(np.eye(count, dtype=bool), -2, inspection.similarity)
    rows = [
        {
            "n": n,
            "color": cluster_color(n, count),
            "texts": sizes[n] if sizes else None,
            "share": sizes[n] / sum(sizes) if sizes else None,
            "norm": inspection.norms[n],
            "bar": inspection.norms[n] / largest,
            "like": int(others[n].argmax()) if count > 1 else None,
            "likeness": float(others[n].max()),
            "typical": typical[n],
        }
        for n in range(count)
    ]
    return _template("inspect.html.j2").render(
        manifest=manifest,
        recipe=inspection.recipe,
        blend=BLENDS[manifest.blend],
        built=_date(manifest.serial),
        rows=rows,
        map=cluster_map(pool),
        shown=_axes(pool)[2],
        has_positions=any(text.get("position") for own in typical for text in own),
        heats=[
            ("The LoRAs", "cosine of the products B A", _heat(inspection.similarity, "LoRAs: cosine")),
            ("The indicators", "cosine", _heat(inspection.cosines, "indicators: cosine")),
        ],
        side=LABELS + count * CELL,
        cell=CELL,
        settings={key: json.dumps(value, ensure_ascii=False) for key, value in manifest.settings.items()},
        bytes=sum(file.size for file in manifest.files),
    )


def write_report(inspection: Inspection, out: Path) -> None:
    """The page, at `out`.

    Raises:
        OutputError: it cannot be written.
    """
    from crayon_runtime.files import atomic_file

    with atomic_file(out) as file:
        file.write(render(inspection).encode())


def _date(serial: int) -> str:
    """A serial is a Unix time, unless someone chose another."""
    try:
        return f"{datetime.fromtimestamp(serial, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return str(serial)


def _template(name: str) -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    return environment.from_string(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
