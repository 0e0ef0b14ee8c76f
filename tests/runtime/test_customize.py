"""Customization of a real, tiny bundle with pools whose right adapter is known."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_export.exporter import export
from crayon_runtime import affinity
from crayon_runtime.affinity import Projection
from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.customize import customize as command
from crayon_runtime.customize import (
    Customization,
    Settings,
    alpha_of,
    customize,
    disguise,
    kept_examples,
    read_state,
    state_folder,
)
from crayon_runtime.customized import current, example_states, made_from
from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, CrayonError, InvalidInput, ManifestError, OutputError
from crayon_runtime.examples import Example, Score, answer_log_loss, score
from crayon_runtime.pool import Embedding, Pool, write_adapter_bundle
from crayon_runtime.prototypes import choose, read_prototypes
from crayon_runtime.remote import PoolClient
from crayon_runtime.routing.calibrate import Query, calibrate
from crayon_runtime.routing.router import Router
from crayon_runtime.signing import KeyStore
from tests.export.models import TEXT, tiny_llama, tiny_tokenizer
from tests.runtime import bundles, pools, services, tiny
from tests.support import ROOT, needs

SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32), "mlp.down_proj": (96, 64)}.items()
}
PROMPTS = ("Set an alarm for 7:30", "Once upon a time", "remind me to buy milk", "The quick brown fox")
RIGHT = 1
"""The adapter that the examples come from."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("customize")
    model = tiny_tokenizer(tiny_llama(folder / "model"))
    return export(model, folder / "bundle", context_length=64).bundle


@pytest.fixture(scope="module")
def loaded(exported: Bundle) -> Iterator[Engine]:
    with Engine.load(exported, threads=1) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    loaded.set_adapter(None)
    return loaded


@pytest.fixture(scope="module")
def loras() -> list[pools.Lora]:
    return pools.loras(shapes=SHAPES, gain=0.7)


@pytest.fixture(scope="module")
def right(exported: Bundle, loras: list[pools.Lora], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The right adapter alone."""
    folder = tmp_path_factory.mktemp("right")
    pool = pools.write(folder / "pool", adapters=loras, located=pools.projection(3, 64), base=base_of(exported))
    blended = pool.blend(np.eye(3, dtype=np.float32)[RIGHT])
    return write_adapter_bundle(blended, folder / "right", name="right", base_fingerprint=base_of(exported))


@pytest.fixture(scope="module")
def examples(loaded: Engine, right: Bundle) -> list[Example]:
    """What the right adapter is most for."""
    return [max(row, key=row.__getitem__) for row in gains(loaded, right)]


@pytest.fixture(scope="module")
def own(loaded: Engine, right: Bundle) -> list[Example]:
    """What it is most against."""
    return [min(row, key=row.__getitem__) for row in gains(loaded, right)]


@pytest.fixture
def pool(engine: Engine, examples: list[Example], loras: list[pools.Lora], tmp_path: Path) -> Pool:
    return near(engine, examples, tmp_path / "pool", adapters=loras)


def base_of(bundle: Bundle) -> str:
    return bundle.model.base_fingerprint


def gains(engine: Engine, right: Bundle) -> list[dict[Example, float]]:
    """For each prompt: how much less log-loss each word has with the right adapter than with the base."""
    adapter = engine.read_adapter(right)

    def gain(example: Example) -> float:
        return answer_log_loss(engine, [example]) - answer_log_loss(engine, [example], adapter)

    words = [Example(prompt, f" {word}") for prompt in PROMPTS for word in TEXT[1].split()]
    return [{e: gain(e) for e in words if e.prompt == prompt} for prompt in PROMPTS]


def near(engine: Engine, examples: list[Example], out: Path, *, wrong: bool = False, **changes: Any) -> Pool:
    """A pool that finds these examples at the indicator of the right adapter (`wrong`: of the one after it)."""
    located = pools.projection(3, 64)
    query = located.query(engine.embed(examples, part="prompt"), engine.embed(examples, part="answer")).mean(0)
    z = (query - located.mean) @ located.projection
    basis = np.linalg.qr(np.column_stack([z, *np.eye(4, dtype=np.float32)[:, :3].T]))[0].T
    basis[0] *= np.sign(basis[0] @ z)
    indicators = np.roll(basis[:3], RIGHT + wrong, axis=0)
    located = Projection(
        located.mean, located.projection, indicators, located.prompt_mean, located.answer_mean, located.ridge
    )
    base = changes.pop("base", None) or base_of(engine.bundle)  # type: ignore[arg-type]
    return pools.write(out, located=located, base=base, **changes)


def whole(folder: Path) -> dict[str, bytes]:
    """The files of a customized adapter, whose hashes and state were checked."""
    Bundle.open(folder / "adapter", verify=True)
    read_state(folder)
    kept_examples(folder)
    assert example_states(folder) is not None
    return bundles.contents(folder)


def test_examples_lead_to_the_adapter_that_they_come_from(
    engine: Engine, examples: list[Example], right: Bundle, pool: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    result = customize(engine, examples, pool, folder=folder)

    assert result.installed, result.reason
    expected = affinity.alpha(
        pool.projection,
        pool.manifest.weighting,
        engine.embed(examples, part="prompt", base=True),
        engine.embed(examples, part="answer", base=True),
    )
    np.testing.assert_allclose(result.alpha, expected, rtol=1e-4)
    np.testing.assert_allclose(alpha_of(engine, examples, pool.manifest, pool.projection), expected, rtol=1e-6)
    assert int(np.argmax(result.alpha)) == RIGHT
    assert result.alpha[RIGHT] > 0.99
    assert result.log_loss == pytest.approx(answer_log_loss(engine, examples, engine.read_adapter(right)), rel=0.02)
    assert result.log_loss < 0.9 * result.log_loss_base
    assert result.log_loss_before == result.log_loss_base
    assert result.logit_change > 0.1
    assert result.log_loss_exact is None
    assert result.sent == {
        "base_fingerprint": base_of(engine.bundle),  # type: ignore[arg-type]
        "pool_version": pool.manifest.version,
        "alpha": result.alpha,
    }
    assert len(json.dumps(result.sent)) < 1024

    assert result.adapter == folder / "adapter"
    assert engine.adapter == "customized", "the engine answers with it"
    assert sorted(bundles.contents(folder)) == [
        "adapter/adapter.onnx_adapter",
        "adapter/manifest.json",
        "examples.jsonl",
        "examples.safetensors",
        "state.json",
    ]
    assert kept_examples(folder) == examples
    state = read_state(folder)
    assert (state.pool_version, state.alpha, state.refined) == (pool.manifest.version, result.alpha, False)
    assert state.log_loss == result.log_loss


def test_what_the_customized_model_makes_of_the_examples_is_kept(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    assert example_states(folder) is None
    assert customize(engine, examples, pool, folder=folder).installed
    found = example_states(folder)
    assert found is not None
    assert engine.adapter == "customized"
    np.testing.assert_allclose(found.prompt, engine.embed(examples, part="prompt", base=False), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.answer, engine.embed(examples, part="answer", base=False), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found.answer, engine.embed(examples, part="answer", base=True), atol=1e-3)
    adapter = engine.read_adapter(Bundle.open(folder / "adapter"))
    expected = [-answer_log_loss(engine, [example], adapter) for example in examples]
    np.testing.assert_allclose(found.log_probability, expected, rtol=1e-5)


def test_prototypes_come_with_the_adapter(
    engine: Engine, examples: list[Example], loras: list[pools.Lora], tmp_path: Path
) -> None:
    made = pools.prototypes((0,) * 40 + (1,) * 50 + (2,) * 3, 64)
    pool = near(engine, examples, tmp_path / "pool", adapters=loras, server=made)
    folder = tmp_path / "customized"
    result = customize(engine, examples, pool, folder=folder)
    assert result.alpha[RIGHT] > 0.99
    found = read_prototypes(Bundle.open(folder / "adapter", verify=True), 64)
    assert found is not None
    expected = made.states[choose(result.alpha, made.clusters, 64)]
    np.testing.assert_array_equal(found.states, expected)
    assert (found.states[:, None] == made.states[40:90]).all(2).any(1).sum() == 50, "all of the right cluster"
    np.testing.assert_array_equal(found.mean, made.mean)
    size = (folder / "adapter/prototypes.safetensors").stat().st_size
    assert result.prototypes_bytes == size
    assert 64 * 64 * 2 + 64 * 4 < size < 64 * 64 * 2 + 64 * 4 + 512
    assert "prototypes" not in result.sent

    few = customize(engine, examples, pool, folder=folder, prototypes=7)
    seven = read_prototypes(Bundle.open(folder / "adapter"), 64)
    assert seven is not None
    assert len(seven.states) == 7
    assert few.sent["prototypes"] == 7
    assert customize(engine, examples, pool, folder=folder, prototypes=0).prototypes_bytes == 0
    assert read_prototypes(Bundle.open(folder / "adapter"), 64) is None
    assert not (folder / "adapter/prototypes.safetensors").exists()


@pytest.mark.parametrize("count", [-1, 1025, 3.5, True])
def test_no_such_number_of_prototypes(engine: Engine, examples: list[Example], pool: Pool, count: Any) -> None:
    with pytest.raises(InvalidInput, match="it must be from 0 to 1024"):
        customize(engine, examples, pool, prototypes=count)


def test_states_that_are_no_numbers_are_refused(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(engine: Engine, examples: list[Example], adapter: Any = None) -> Score:
        found = score(engine, examples, adapter)
        if adapter is not None:
            found.means["answer"][1, 2] = np.nan
        return found

    monkeypatch.setattr("crayon_runtime.customize.score", wrong)
    result = customize(engine, examples, pool, folder=tmp_path / "customized")
    assert (result.installed, result.reason) == (False, "the states of the examples are not numbers with it")
    assert not (tmp_path / "customized").exists()


@pytest.mark.parametrize("dtype, near", [("fp32", 1e-4), ("fp16", 3e-3), ("int8", 3e-2)])
def test_a_service_makes_what_the_device_makes_of_the_same_pool(
    engine: Engine, examples: list[Example], pool: Pool, dtype: Any, near: float, tmp_path: Path
) -> None:
    keys = KeyStore.create(tmp_path / "keys")
    here = customize(engine, examples, pool, folder=tmp_path / "here", digits=4)
    with (
        services.real(pool, keys, tmp_path / "archives") as url,
        PoolClient(url, trusted=keys.trusted) as client,
    ):
        there = customize(engine, examples, client, folder=tmp_path / "there", dtype=dtype)
    assert there.installed
    assert there.alpha == here.alpha
    assert there.sent == here.sent | {"dtype": dtype}
    assert there.log_loss == pytest.approx(here.log_loss, rel=near)
    assert there.logit_change == pytest.approx(here.logit_change, rel=10 * near)
    assert Bundle.open(tmp_path / "there/adapter").as_adapter.pool == pool.manifest.origin


def test_it_is_there_after_a_restart(engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path) -> None:
    result = customize(engine, examples, pool, folder=tmp_path / "customized")
    customized = engine.generate(PROMPTS[0], max_new_tokens=8).token_ids
    with Engine.load(engine.bundle, threads=1) as restarted:  # type: ignore[arg-type]
        assert restarted.generate(PROMPTS[0], max_new_tokens=8).token_ids != customized
        restarted.set_adapter(result.adapter)
        assert restarted.generate(PROMPTS[0], max_new_tokens=8).token_ids == customized


def test_a_calibration_stays_with_the_adapter_that_it_was_made_with(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    customize(engine, examples, pool, folder=folder)
    router = Router(engine, folder=folder)
    assert router.policy.name == "calibrated"
    queries = [Query(example.prompt, completion=example.completion) for example in examples]
    made = calibrate(engine, queries, folder, budget=0.5, max_new_tokens=4)
    made.write(folder)

    customize(engine, examples, pool, folder=folder)
    assert Router(engine, folder=folder).policy == made.policy("calibrated"), "the adapter is the same"
    customize(engine, examples[:1], pool, folder=folder, digits=1)
    router = Router(engine, folder=folder)
    assert router.policy != made.policy("calibrated")
    assert "made with another adapter" in router.known(engine.present_adapter).notes[0]
    assert router.answer(examples[0].prompt, max_new_tokens=4).signals.keys() == router.policy.weights.keys()


def test_alpha_does_not_depend_on_the_adapter_in_place(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path
) -> None:
    first = customize(engine, examples, pool, folder=tmp_path / "customized")
    second = customize(engine, examples, pool, folder=tmp_path / "customized")
    assert second.installed
    assert second.alpha == first.alpha
    assert second.log_loss_before == second.log_loss == first.log_loss


def test_an_adapter_that_makes_it_worse_is_rolled_back(
    engine: Engine, examples: list[Example], pool: Pool, loras: list[pools.Lora], tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, examples, pool, folder=folder)
    before = whole(folder)
    worse = near(engine, examples, tmp_path / "worse", wrong=True, adapters=loras)
    result = customize(engine, examples, worse, folder=folder)
    assert not result.installed
    assert "the log-loss of the examples is" in result.reason
    assert "the earlier adapter's is" in result.reason
    assert result.log_loss > result.log_loss_before
    assert result.adapter == folder / "adapter"
    assert whole(folder) == before
    assert engine.adapter == "customized"


def test_the_base_stays_where_the_first_adapter_is_worse(
    engine: Engine, own: list[Example], loras: list[pools.Lora], tmp_path: Path
) -> None:
    pool = near(engine, own, tmp_path / "pool", adapters=loras)
    result = customize(engine, own, pool, folder=tmp_path / "customized")
    assert (result.installed, result.adapter, engine.adapter) == (False, None, None)
    assert "the base model's is" in result.reason
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_an_adapter_that_changes_nothing_is_refused(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    silent = near(engine, examples, tmp_path / "pool", adapters=pools.loras(shapes=SHAPES, gain=0))
    result = customize(engine, examples, silent, folder=tmp_path / "customized")
    assert (result.installed, result.logit_change) == (False, 0)
    assert result.reason == "it does not change what the model says"
    assert not (tmp_path / "customized").exists()


def test_refining_never_makes_the_examples_worse(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    shapes = {module: SHAPES[module] for module in list(SHAPES)[:2]}
    pool = near(engine, examples, tmp_path / "pool", wrong=True, adapters=pools.loras(shapes=shapes, gain=0.7))
    plain = customize(engine, examples, pool, folder=tmp_path / "plain")
    seen: list[int] = []
    refined = customize(
        engine,
        examples,
        pool,
        folder=tmp_path / "refined",
        refine=True,
        refine_evaluations=12,
        on_evaluation=seen.append,
    )
    assert seen == [1] * 12
    assert refined.log_loss < plain.log_loss
    again = customize(engine, examples, pool, folder=tmp_path / "x", refine=True, refine_evaluations=12)
    assert again.alpha == refined.alpha
    if refined.installed:
        assert read_state(tmp_path / "refined").refined


def test_rounding_and_noise_have_their_measured_cost(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path
) -> None:
    exact = customize(engine, examples, pool, folder=tmp_path / "customized")
    rounded = customize(engine, examples, pool, folder=tmp_path / "customized", digits=1)
    assert rounded.alpha == [0.0, 1.0, 0.0]
    assert rounded.log_loss_exact == pytest.approx(exact.log_loss, rel=1e-6)
    assert rounded.sent["alpha"] == [0.0, 1.0, 0.0]


def test_disguise() -> None:
    alpha = np.array([0.123, 0.0, 0.877], np.float32)
    np.testing.assert_array_equal(disguise(alpha), alpha)
    np.testing.assert_array_equal(disguise(alpha, digits=2), np.float32([0.12, 0, 0.88]))
    noisy = np.array([disguise(alpha, noise=0.1, seed=seed) for seed in range(500)])
    assert noisy.min() == 0
    assert noisy[:, 2].mean() == pytest.approx(0.877, abs=0.02)
    assert noisy[:, 2].std() == pytest.approx(0.1, abs=0.02)
    assert (disguise(alpha, noise=1.0, seed=0, signed=True) < 0).any()
    assert (disguise(alpha, noise=0.1) != disguise(alpha, noise=0.1)).any()
    for options in ({"digits": -1}, {"digits": 1.5}, {"noise": -0.1}, {"noise": float("nan")}):
        with pytest.raises(InvalidInput):
            disguise(alpha, **options)


@pytest.mark.parametrize("part", ["answer", "all", "prompt"])
def test_pools_without_residual(engine: Engine, examples: list[Example], part: Any, tmp_path: Path) -> None:
    located = pools.projection(3, 64, residual=False)
    pool = pools.write(
        tmp_path / "pool",
        adapters=pools.loras(shapes=SHAPES, gain=0),
        located=located,
        base=base_of(engine.bundle),  # type: ignore[arg-type]
        embedding=Embedding(2, part, False),
    )
    result = customize(engine, examples, pool, folder=tmp_path / "customized")
    cosines = located.cosines(engine.embed(examples, part=part).mean(0))
    np.testing.assert_allclose(result.alpha, affinity.weights(cosines, pool.manifest.weighting), rtol=1e-4)


def test_another_base_names_both(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    pool = near(engine, examples, tmp_path / "pool", base="c" * 64)
    with pytest.raises(AdapterError, match=f"cccccccccccc…; this one is {base_of(engine.bundle)[:12]}…"):  # type: ignore[arg-type]
        customize(engine, examples, pool, folder=tmp_path / "customized")


def test_another_tap(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    pool = near(engine, examples, tmp_path / "pool", embedding=Embedding(1, "answer", True))
    with pytest.raises(AdapterError, match="embeds at layer 1; this bundle's tap is layer 2"):
        customize(engine, examples, pool, folder=tmp_path / "customized")


def test_states_of_another_size(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    pool = pools.write(tmp_path / "pool", base=base_of(engine.bundle))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="embeds states of 8; this model's have 64"):
        customize(engine, examples, pool, folder=tmp_path / "customized")


def test_adapters_that_the_model_has_no_slots_for(engine: Engine, examples: list[Example], tmp_path: Path) -> None:
    pool = near(engine, examples, tmp_path / "pool")
    with pytest.raises(AdapterError):
        customize(engine, examples, pool, folder=tmp_path / "customized")
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_an_earlier_adapter_of_another_base_is_replaced_and_said(
    engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, examples, pool, folder=folder)
    (folder / "adapter").rename(tmp_path / "aside")
    bundles.write_adapter(folder / "adapter")
    result = customize(engine, examples, pool, folder=folder)
    assert result.installed
    assert "the earlier adapter does not fit this model" in result.reason
    assert result.log_loss_before == result.log_loss_base


def test_an_earlier_adapter_of_another_base_does_not_stay_in_use(
    engine: Engine, own: list[Example], loras: list[pools.Lora], tmp_path: Path
) -> None:
    pool, folder = near(engine, own, tmp_path / "pool", adapters=loras), tmp_path / "customized"
    folder.mkdir()
    bundles.write_adapter(folder / "adapter")
    (folder / "state.json").touch()
    before = bundles.contents(folder)
    result = customize(engine, own, pool, folder=folder)
    assert (result.installed, result.adapter) == (False, None)
    assert "the base model's is" in result.reason
    assert "the earlier adapter does not fit this model" in result.reason
    assert bundles.contents(folder) == before


def test_state_of_an_earlier_version(engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "customized"
    customize(engine, examples, pool, folder=folder)
    state = json.loads((folder / "state.json").read_bytes())
    for name in ("settings", "made_from", "newest_serial"):
        del state[name]
    (folder / "state.json").write_text(json.dumps(state))
    assert read_state(folder).newest_serial == 0
    assert current(folder, "") is not None
    assert customize(engine, examples, pool, folder=folder).installed
    assert current(folder, "") is None
    assert current(folder, made_from(base_of(engine.bundle), examples, pool.manifest, Settings()))  # type: ignore[arg-type]


def test_nothing_else_is_ever_replaced(engine: Engine, examples: list[Example], pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").touch()
    with pytest.raises(OutputError, match="something else"):
        customize(engine, examples, pool, folder=tmp_path / "home")
    assert (tmp_path / "home/letter").exists()


def test_a_full_disk_leaves_the_old_adapter(engine: Engine, examples: list[Example], pool: Pool) -> None:
    with needs.tmpfs(256 * 1024) as disk:
        result = customize(engine, examples, pool, folder=disk / "customized")
        before = whole(disk / "customized")
        with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 8192)
        with pytest.raises(OutputError, match="the disk is full"):
            customize(engine, examples, pool, folder=disk / "customized")
        assert whole(disk / "customized") == before
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "customized"]
        engine.set_adapter(None)
    assert result.installed


def test_state_that_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not customized"):
        read_state(tmp_path)
    for content in (b"", b"[]", b'{"schema_version": "1.0"}', b"\xff"):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(ManifestError):
            read_state(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from crayon_runtime import Engine, customize as library, files
from crayon_runtime.pool import Pool

bundle, pool, folder, name, when = sys.argv[1:]
folder = Path(folder)
module = files if name == "_move" else library
original = getattr(module, name)
is_meant = {
    "write_adapter_bundle": lambda _, out, **options: out.parent.parent == folder.parent,
    "_prove": lambda *_: True,
    "_move": lambda partial, target, replace: target == folder,
}[name]

def dying(*arguments, **options):
    if not is_meant(*arguments, **options):
        return original(*arguments, **options)
    if when == "after":
        original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

with Engine.load(bundle, threads=1) as engine:
    examples = library.kept_examples(folder)
    setattr(module, name, dying)
    library.customize(engine, examples, Pool.open(pool), folder=folder, digits=3)
"""


@pytest.mark.parametrize(
    "moment, new",
    [
        ("write_adapter_bundle before", False),
        ("write_adapter_bundle after", False),
        ("_prove after", False),
        ("_move before", False),
        ("_move after", True),
    ],
)
def test_a_device_that_dies_comes_back_with_the_old_or_the_new_adapter(
    engine: Engine, examples: list[Example], pool: Pool, moment: str, new: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "customized"
    customize(engine, examples, pool, folder=folder)
    old = whole(folder)
    program = [sys.executable, "-c", KILLED, engine.bundle.path, pool.path, folder, *moment.split()]  # type: ignore[union-attr]
    died = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr

    assert (whole(folder) != old) == new
    assert len(list(tmp_path.glob(".customized.partial-*"))) == 1
    assert customize(engine, examples, pool, folder=folder).installed
    assert whole(folder) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["customized", "pool"]


@pytest.mark.parametrize(
    "how",
    [
        "kill",
        "full",
        pytest.param("kill without-exchange", marks=pytest.mark.slow),
        pytest.param("kill service", marks=pytest.mark.slow),
        pytest.param("full service", marks=pytest.mark.slow),
    ],
)
def test_a_device_that_fails_at_any_file_operation(how: str, tmp_path: Path) -> None:
    """See `tests.runtime.dying`."""
    tiny.bundle(tmp_path)
    pool = pools.write(tmp_path / "pool")
    (tmp_path / "service").mkdir()
    kind, *options = how.split()
    with services.Service(pool, None, tmp_path / "service") as service:
        source = service.url if "service" in options else str(pool.path)
        options = [option for option in options if option != "service"]
        program = [sys.executable, "-m", "tests.runtime.dying", kind, *options, str(tmp_path), source]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    operations, old, new = map(int, re.findall(r"\d+", done.stdout))
    assert operations > 30
    assert min(old, new) > 5


def call(*arguments: object) -> Any:
    return CliRunner(catch_exceptions=False).invoke(command, [*map(str, arguments)])


def test_the_command(exported: Bundle, examples: list[Example], pool: Pool, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.symlink_to(exported.path)
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples))

    shown = call(bundle, "--examples", file, "--pool", pool.path, "--threads", 1, "--round", 2)
    assert shown.exit_code == 0, shown.output
    folder = tmp_path / "bundle.customized"
    assert f"crayon run {bundle} --adapter {folder / 'adapter'} PROMPT" in shown.stdout
    assert "without noise and rounding" in shown.stdout
    assert "a service would be sent 3 numbers" in shown.stderr
    assert "fingerprint" in shown.stderr
    assert state_folder(bundle) == folder
    whole(folder)

    again = call(bundle, "--pool", pool.path, "--threads", 1, "--json")
    assert again.exit_code == 0, again.output
    result = json.loads(again.stdout)
    assert result["installed"] is True
    assert set(result) == {*Customization.__dataclass_fields__, "up_to_date"}
    assert result["adapter"] == str(folder / "adapter")
    assert (result["sent_bytes"], result["received_bytes"]) == (0, 0)
    assert list(result["seconds"]) == ["load", "embed", "alpha", "blend", "prove", "swap"]

    nothing_new = call(bundle, "--pool", pool.path, "--threads", 1)
    assert nothing_new.exit_code == 0
    assert "already customized with pool random" in nothing_new.stdout
    assert "log-loss" not in nothing_new.stdout
    assert "log-loss" in call(bundle, "--pool", pool.path, "--threads", 1, "--again").stdout


def test_the_command_says_what_prototypes_cost(
    engine: Engine, exported: Bundle, examples: list[Example], loras: list[pools.Lora], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.symlink_to(exported.path)
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples))
    pool = near(engine, examples, tmp_path / "pool", adapters=loras, server=pools.prototypes((0, 1, 1, 2), 64))
    options = ("--examples", file, "--pool", pool.path, "--threads", 1)
    assert "its prototypes, which tell when to ask the server LLM: 1.0 kB" in call(bundle, *options).stdout
    assert "already customized" in call(bundle, *options).stdout
    fewer = call(bundle, *options, "--prototypes", 2, "--json")
    assert 500 < json.loads(fewer.stdout)["prototypes_bytes"] < 900
    assert "prototypes" not in call(bundle, *options, "--prototypes", 0).stdout


def test_the_command_says_when_it_kept_the_old(
    engine: Engine, exported: Bundle, own: list[Example], loras: list[pools.Lora], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.symlink_to(exported.path)
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example._asdict()) + "\n" for example in own))
    pool = near(engine, own, tmp_path / "pool", adapters=loras)
    result = call(bundle, "--examples", file, "--pool", pool.path, "--threads", 1)
    assert result.exit_code == 1
    assert "not customized: the log-loss" in result.stdout
    assert "the base model stays as it is" in result.stdout


def test_the_command_without_examples(exported: Bundle, pool: Pool, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.symlink_to(exported.path)
    with pytest.raises(CrayonError, match="the examples cannot be read: none are kept"):
        call(bundle, "--pool", pool.path)
