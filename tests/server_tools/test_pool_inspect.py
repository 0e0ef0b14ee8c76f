"""Looking into a pool: norms and similarities against products formed in full, and a page that holds whatever the pool holds."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.errors import AdapterError, CrayonError, IntegrityError, InvalidInput, OutputError
from crayon_runtime.pool import Pool
from crayon_server.cli import pool as cli_pool
from crayon_server.pool.inspect import RECIPES, cluster_map, gram, inspect, render
from tests.runtime import pools
from tests.support import needs

SVG = {"svg": "http://www.w3.org/2000/svg"}
COUNT = 4
TYPICAL = [
    {"cluster": n, "prompt": f"prompt {n}.{i}", "completion": f"answer {n}.{i}", "position": np.eye(4)[n].tolist()}
    for n in range(COUNT)
    for i in range(3)
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    adapters = pools.loras(COUNT, rank=3)
    adapters[2] = {module: (2 * a, b) for module, (a, b) in adapters[1].items()}
    adapters[3] = {module: (a, 0 * b) for module, (a, b) in adapters[3].items()}
    settings = {"recipe": "groups", "seed": 7, "sizes": [10, 40, 0, 5], "note": "<b>&"}
    return pools.write(
        tmp_path_factory.mktemp("pools") / "p",
        adapters=adapters,
        typical=TYPICAL,
        settings=settings,
        serial=1_700_000_000,
    )


def products(pool: Pool) -> np.ndarray:
    """float64 [N, all weights]: s B A of each LoRA, in full."""
    return np.stack(
        [
            np.concatenate(
                [
                    (pool.manifest.scale * b.astype(np.float64) @ a.astype(np.float64)).ravel()
                    for a, b in (pool.lora(n)[module] for module in pool.manifest.targets)
                ]
            )
            for n in range(pool.manifest.adapters)
        ]
    )


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """The peak of what Python and numpy have allocated in the block, in bytes."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Numbers


def test_gram_is_that_of_the_products(pool) -> None:
    full = products(pool)
    np.testing.assert_allclose(gram(pool), full @ full.T, rtol=1e-10, atol=1e-10)


def test_norms_and_similarities(pool) -> None:
    inspected = inspect(pool)
    np.testing.assert_allclose(inspected.norms, np.linalg.norm(products(pool), axis=1), rtol=1e-10)
    assert inspected.norms[2] == pytest.approx(2 * inspected.norms[1])
    assert inspected.similarity[1, 2] == pytest.approx(1)
    np.testing.assert_allclose(inspected.similarity, inspected.similarity.T)
    np.testing.assert_allclose(np.diag(inspected.similarity)[:3], 1)
    np.testing.assert_array_equal(inspected.similarity[3], 0)  # it adds nothing, which is like nothing
    indicators = needs.module("sklearn.metrics.pairwise").cosine_similarity(pool.projection.indicators)
    np.testing.assert_allclose(inspected.cosines, indicators, atol=1e-5)


def test_sizes_come_from_the_build_or_from_nowhere(pool, tmp_path) -> None:
    assert inspect(pool).sizes == [10, 40, 0, 5]
    for n, sizes in enumerate((None, [1, 2], "x", [1, 2, "x"], [0, 0, 0], [1, -1, 1], {"a": 1})):
        other = pools.write(tmp_path / str(n), settings={} if sizes is None else {"sizes": sizes})
        assert inspect(other).sizes is None
        assert "–" in render(inspect(other))


def test_products_are_never_formed(tmp_path) -> None:
    """At the widths of a 7B model: one product is 180 MB in float32; a module's factors are 2 MB."""
    shapes = {f"model.layers.{n}.mlp.down_proj": (11008, 4096) for n in range(3)}
    wide = pools.write(tmp_path / "wide", adapters=pools.loras(4, 8, shapes))
    with traced() as peak:
        gram(wide)
        assert peak() < 40e6


# The map


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def circles(svg: str) -> dict[str, tuple[float, float, float]]:
    """(x, y, radius) of each cluster and text by what hovering shows."""
    return {
        group.find("svg:title", SVG).text: tuple(float(circle.get(key)) for key in ("cx", "cy", "r"))
        for group in parse(svg).findall("svg:g", SVG)
        if (circle := group.find("svg:circle", SVG)) is not None
    }


def test_a_map_keeps_distances_in_its_plane(pool) -> None:
    drawn = circles(cluster_map(pool))
    places = np.array([drawn[f"cluster {n}, {size} texts"][:2] for n, size in enumerate([10, 40, 0, 5])])
    pca = needs.module("sklearn.decomposition").PCA(2).fit_transform(pool.projection.indicators)

    def distances(points):
        return np.linalg.norm(points[:, None] - points, axis=2)

    ratio = distances(places).sum() / distances(pca).sum()
    np.testing.assert_allclose(distances(places), ratio * distances(pca), atol=0.5)


def test_areas_are_sizes_and_dots_are_typical_texts(pool) -> None:
    drawn = circles(cluster_map(pool))
    assert drawn["cluster 1, 40 texts"][2] == pytest.approx(2 * drawn["cluster 0, 10 texts"][2], abs=0.1)
    assert drawn["cluster 2, 0 texts"][2] > 0
    assert "2: prompt 2.1 → answer 2.1" in drawn
    assert len(drawn) == 4 + 12


def test_extra_points_lie_where_their_direction_points(pool) -> None:
    indicator = pool.projection.indicators[1]
    svg = cluster_map(pool, [("alice <3", 5 * indicator), ("bob", -indicator)])
    at = circles(svg)["cluster 1, 40 texts"]
    paths = {
        g.find("svg:title", SVG).text: g.find("svg:path", SVG).get("d")
        for g in parse(svg).findall("svg:g", SVG)
        if g.find("svg:path", SVG) is not None
    }
    assert set(paths) == {"alice <3", "bob"}
    _, x, y, *_ = paths["alice <3"].split()
    assert (float(x), float(y) + 7) == pytest.approx(at[:2], abs=0.11)


@pytest.mark.parametrize("z", [[1.0], [1, 2, 3, float("nan")], np.ones((2, 4))])
def test_extra_points_that_are_none(pool, z) -> None:
    with pytest.raises(InvalidInput, match="4 finite numbers"):
        cluster_map(pool, [("alice", z)])


@pytest.mark.parametrize("count, k", [(1, 4), (2, 1), (3, 1), (40, 4)])
def test_maps_of_few_and_of_many(tmp_path, count, k) -> None:
    located = pools.projection(count, k=k)
    other = pools.write(tmp_path / "p", adapters=pools.loras(count), located=located)
    assert len(circles(cluster_map(other))) == count
    for x, y, radius in circles(cluster_map(other)).values():
        assert 0 <= x - radius <= x + radius <= 640
        assert 0 <= y - radius <= y + radius <= 440
    assert "nan" not in render(inspect(other)).lower()


# The page


class Page(HTMLParser):
    """Tags, and what a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.fetched += [
            f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data") or k.startswith("on")
        ]

    def handle_data(self, data) -> None:
        self.text += data


def test_the_page_shows_everything(pool) -> None:
    page = Page(render(inspect(pool)))
    manifest = pool.manifest
    for shown in (
        manifest.name,
        manifest.version,
        "1700000000",
        "2023-11-14 22:13 UTC",
        manifest.base_fingerprint,
        RECIPES["groups"],
    ):
        assert shown in page.text
    for key in manifest.settings:
        assert key in page.text
    for text in TYPICAL:
        assert text["prompt"] in page.text
        assert text["completion"] in page.text
    assert page.tags.count("svg") == 3
    assert page.tags.count("rect") == 2 * COUNT**2
    assert "script" not in page.tags
    assert page.fetched == []


def test_texts_cannot_become_markup(tmp_path) -> None:
    bad = '</title><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7 * 7 }}'
    typical = [{"cluster": 0, "prompt": bad, "completion": bad, "position": [1.0, 0, 0, 0]}]
    other = pools.write(tmp_path / "p", typical=typical, settings={bad: bad, "recipe": bad})
    page = Page(render(inspect(other)))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.fetched == []
    assert page.text.count("{{ 7 * 7 }}") >= 4
    Page(cluster_map(other, [(bad, [1, 0, 0, 0])]))
    parse(cluster_map(other, [(bad, [1, 0, 0, 0])]))


def test_recipes_that_nobody_knows(tmp_path) -> None:
    for n, settings in enumerate(({}, {"recipe": "tomorrow's"}, {"recipe": ["x"]})):
        render(inspect(pools.write(tmp_path / str(n), settings=settings)))


@pytest.mark.parametrize("serial", [1, 2**53, 2**63 - 1])
def test_serials_that_are_no_time(tmp_path, serial: int) -> None:
    assert str(serial) in render(inspect(pools.write(tmp_path / "p", serial=serial)))


# Commands


def invoke(*arguments: object):
    return CliRunner().invoke(cli_pool.pool, ["inspect", *map(str, arguments)])


def test_inspect_on_the_command_line(pool, tmp_path) -> None:
    shutil.copytree(pool.path, tmp_path / "mine")
    done = invoke(tmp_path / "mine")
    assert done.exit_code == 0, done.output
    assert RECIPES["groups"] in done.stdout
    assert (tmp_path / "mine.html").read_text() == render(inspect(pool))
    assert invoke(tmp_path / "mine", "--out", tmp_path / "report.html").exit_code == 0
    assert Pool.open(tmp_path / "mine", verify=True).manifest == pool.manifest


def test_json(pool, tmp_path) -> None:
    shutil.copytree(pool.path, tmp_path / "mine")
    done = invoke(tmp_path / "mine", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["report"] is None
    assert [adapter["texts"] for adapter in document["adapters"]] == [10, 40, 0, 5]
    assert document["adapters"][1]["typical"] == TYPICAL[3:6]
    assert np.array(document["similarity"]).shape == np.array(document["indicator_cosines"]).shape == (COUNT, COUNT)
    assert document["settings"] == pool.manifest.settings
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_first_five_typical_texts_are_shown(tmp_path) -> None:
    texts = [
        {"cluster": n, "prompt": f"p{n}-{i}", "completion": "c", "position": [1.0, 0, 0, i]}
        for n in (0, 2)
        for i in range(8)
    ]
    pool = pools.write(tmp_path / "p", typical=texts)
    shown = [[text["prompt"] for text in adapter["typical"]] for adapter in inspect(pool).to_dict()["adapters"]]
    assert shown == [[f"p0-{i}" for i in range(5)], [], [f"p2-{i}" for i in range(5)]]
    page = render(inspect(pool))
    assert "p2-4" in page
    assert "p0-5" not in page
    assert len(pool.typical()) == 16


def test_prototypes_are_shown(pool, tmp_path) -> None:
    other = pools.write(tmp_path / "p", server=pools.prototypes())
    page = render(inspect(other))
    assert "outputs of a-server-llm, embedded" in page
    assert msgspec.to_builtins(inspect(other).to_dict()["prototypes"])["count"] == 6
    assert "prototypes" not in render(inspect(pool))
    assert inspect(pool).to_dict()["prototypes"] is None


def test_pools_that_cannot_be_inspected(pool, tmp_path) -> None:
    for folder in (tmp_path / "absent", tmp_path, Path(__file__)):
        assert isinstance(invoke(folder).exception, CrayonError)
    assert isinstance(invoke(pool.path, "--out", tmp_path).exception, OutputError)
    damaged = tmp_path / "damaged"
    shutil.copytree(pool.path, damaged)
    weights = damaged / "adapters/000/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert isinstance(invoke(damaged).exception, IntegrityError)
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_nan_is_found_when_a_pool_is_verified(tmp_path) -> None:
    adapters = pools.loras()
    next(iter(adapters[1].values()))[1][0, 0] = np.nan
    other = pools.write(tmp_path / "p", adapters=adapters)
    Pool.open(other.path)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        Pool.open(other.path, verify=True)
    assert isinstance(invoke(other.path).exception, AdapterError)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"cluster": 0}', '{"cluster": 3, "prompt": "", "completion": ""}', '{"cluster": -1, "prompt": "", "completion": ""}',
     '{"cluster": 0, "prompt": "", "completion": "", "position": [1, 2]}', '{"cluster": "0", "prompt": "", "completion": ""}', "[" * 100_000],
)  # fmt: skip
def test_typical_texts_that_are_none(tmp_path, line: str) -> None:
    """Whoever made the pool gave it the right hashes, too."""
    pool = pools.write(tmp_path / "p", typical=[{"cluster": 0, "prompt": "a", "completion": "b"}])
    (pool.path / "typical.jsonl").write_text(line + "\n")
    with pytest.raises(IntegrityError):
        pool.typical()
    with pytest.raises(IntegrityError):
        inspect(pool).to_dict()
