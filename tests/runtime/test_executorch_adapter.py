"""Judges: the adapters that the exporter makes, which ExecuTorch's own exporter confirms, and what they compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_export.adapters import convert_adapter
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.adapter import onnx_tensors
from crayon_runtime import Engine, backends
from crayon_runtime.blend import Blended, write_adapter_bundle
from crayon_runtime.bundle import Bundle, BundleWriter, write_adapter
from crayon_runtime.bundle.adapter import Slots
from crayon_runtime.customize import customize
from crayon_runtime.customized import backend_for, slots_of, state_folder
from crayon_runtime.errors import AdapterError, IntegrityError, InvalidInput, ManifestError
from crayon_runtime.examples import Example
from crayon_runtime.manifest import ExecutorchAdapterVariant, ExecutorchSlots, ModelManifest, Variants
from crayon_runtime.pool import Pool
from crayon_runtime.remote import PoolClient
from tests import programs
from tests.runtime import bundles, pools, services
from tests.support import needs

IDS = np.array([1, 17, 300, 44, 5, 9, 200])
EXAMPLES = [Example("Set an alarm for 7:30", " tomorrow"), Example("Once upon a time", " there was")]


@pytest.fixture(scope="module")
def base() -> Bundle:
    return programs.exported()


@pytest.fixture(scope="module")
def slots(base: Bundle) -> ExecutorchSlots:
    found = slots_of(base)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def alice() -> PeftAdapter:
    return PeftAdapter.open(programs.made().adapters[0])


def data_of(bundle: Bundle) -> bytes:
    variant = bundle.as_adapter.variants.executorch
    assert isinstance(variant, ExecutorchAdapterVariant)
    return b"".join(bundle.read(path) for path in variant.data)


def logits(base: Bundle, adapter: Bundle | None) -> np.ndarray:
    """Of a prompt and five more tokens, [6, V]."""
    backend = backends.load(base, "executorch", threads=1)
    cache = backend.new_cache(backend.read_adapter(adapter) if adapter else None)
    found = [cache.prefill(IDS).logits.copy()]
    for _ in range(5):
        found.append(cache.decode(int(found[-1].argmax())).logits.copy())
    cache.close()
    backend.close()
    return np.array(found)


def blend_of(adapter: PeftAdapter) -> Blended:
    """An adapter as a blend of itself."""
    lora = {module: (adapter.a(module), adapter.b(module)) for module in adapter.targets}
    scale = next(iter(adapter.targets.values())).scale
    return Blended.of([lora], np.ones(1, np.float32), scale, "separate")


def edited(bundle: Bundle, out: Path, **changes: Any) -> Bundle:
    """An adapter bundle whose variant for ExecuTorch is another one."""
    manifest = bundle.as_adapter
    with BundleWriter(out) as writer:
        writer.add_file("adapter.ptd", bundle.file("adapter.ptd"))
        variant = msgspec.structs.replace(manifest.variants.executorch, **changes)
        writer.finish(
            msgspec.structs.replace(
                manifest, variants=msgspec.structs.replace(manifest.variants, executorch=variant, onnx=msgspec.UNSET)
            )
        )
    return Bundle.open(out)


# The file, and the program that it fills


def test_without_a_program_the_base_s_own_is_filled(base: Bundle, tmp_path: Path) -> None:
    inside = base.adapter("alice")
    alone = edited(inside, tmp_path / "alone", program=None)
    assert {file.path for file in alone.manifest.files} == {"adapter.ptd"}
    np.testing.assert_array_equal(logits(base, alone), logits(base, inside))
    assert np.abs(logits(base, alone) - logits(base, None)).max() > 1


def test_a_smaller_rank_is_padded_exactly(
    base: Bundle, slots: ExecutorchSlots, alice: PeftAdapter, tmp_path: Path
) -> None:
    """Ones in the padding that meet zeros on the other side would change nothing either; zeros on both sides are what is written."""
    tensors = onnx_tensors(alice)
    wide = {}
    for name, (shape, compute) in tensors.items():
        rank_axis = 1 if name.endswith("A.weight") else 0
        padding = [(0, 0), (0, 0)]
        padding[rank_axis] = (0, slots.rank - shape[rank_axis])
        matrix = np.pad(compute(), padding)
        wide[name] = (matrix.shape, lambda matrix=matrix: matrix)
    options = {
        "name": "alice",
        "base_fingerprint": base.model.base_fingerprint,
        "dtype": None,
        "executorch": Slots(slots),
    }
    padded = write_adapter(tmp_path / "padded", tensors, **options)
    written = write_adapter(tmp_path / "wide", wide, **options)
    assert data_of(padded) == data_of(written)
    assert {target.rank for target in padded.as_adapter.targets} == {4, 8}


def test_layers_without_an_adapter_stay_as_they_are(
    base: Bundle, slots: ExecutorchSlots, alice: PeftAdapter, tmp_path: Path
) -> None:
    options = {
        "name": "some",
        "base_fingerprint": base.model.base_fingerprint,
        "dtype": None,
        "executorch": Slots(slots),
    }
    nothing = {
        name: (shape, lambda shape=shape: np.zeros(shape, np.float32))
        for name, (shape, _) in onnx_tensors(alice).items()
    }
    only = {name: tensor for name, tensor in onnx_tensors(alice).items() if ".1.mlp.down_proj." in name}
    np.testing.assert_array_equal(
        logits(base, write_adapter(tmp_path / "zeros", nothing, **options)), logits(base, None)
    )
    some = logits(base, write_adapter(tmp_path / "some", only, **options))
    assert np.abs(some - logits(base, None)).max() > 0.1
    filled_up = {**nothing, **only}
    assert data_of(write_adapter(tmp_path / "full", filled_up, **options)) == data_of(Bundle.open(tmp_path / "some"))


def test_a_blend_is_written_as_an_export_writes_it(base: Bundle, slots: ExecutorchSlots, tmp_path: Path) -> None:
    bruno = PeftAdapter.open(programs.made().adapters[1])
    blended = write_adapter_bundle(
        blend_of(bruno), tmp_path / "bruno", name="bruno", base_fingerprint=base.model.base_fingerprint,
        dtype=None, executorch=Slots(slots),
    )  # fmt: skip
    assert data_of(blended) == data_of(convert_adapter(bruno.path, base, tmp_path / "converted"))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: {"model.layers.2.mlp.up_proj.lora_A.weight": t["model.layers.1.mlp.up_proj.lora_A.weight"]}, "it changes model.layers.2"),
        (lambda t: {"model.layers.0.mlp.up_proj.lora_A.weight": ((80, 4), None)}, "is for 80 features; this base has 64"),
        (lambda t: {"model.layers.0.mlp.up_proj.lora_B.weight": ((9, 160), None)}, "its rank is 9; the program .* rank 8"),
        (lambda t: {"model.layers.0.mlp.up_proj.lora_B.weight": ((4, 160), lambda: np.full((4, 160), np.nan, np.float32))}, "holds NaN"),
        (lambda t: {"model.layers.0.mlp.up_proj.lora_B.weight": ((4, 160), lambda: np.zeros((5, 160), np.float32))}, r"has shape \[5, 160\]"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_the_slots_is_refused(
    base: Bundle, slots: ExecutorchSlots, alice: PeftAdapter, tmp_path: Path, change: Any, says: str
) -> None:
    tensors = onnx_tensors(alice)
    with pytest.raises(AdapterError, match=says):
        write_adapter(
            tmp_path / "refused", {**tensors, **change(tensors)}, name="refused",
            base_fingerprint=base.model.base_fingerprint, dtype=None, executorch=Slots(slots),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# What is never served


def test_an_adapter_for_other_slots_is_refused(base: Bundle, tmp_path: Path) -> None:
    inside = base.adapter("alice")
    held = inside.as_adapter.variants.executorch.slots
    backend = backends.load(base, "executorch", threads=1)
    for number, change in enumerate(
        (
            {"rank": 4},
            {"targets": held.targets[1:]},
            {"weights": held.weights[:-2]},
            {"weights": ["0" * 64, *held.weights[1:]]},
        )
    ):
        other = edited(inside, tmp_path / f"{number}", program=None, slots=msgspec.structs.replace(held, **change))
        with pytest.raises(AdapterError, match=r"slots|weights|weight"):
            backend.new_cache(backend.read_adapter(other))
    other = edited(inside, tmp_path / "dtype", program=None, dtype="fp32")
    with pytest.raises(AdapterError, match="in fp32"):
        backend.read_adapter(other)


def test_the_weights_of_one_adapter_under_the_names_of_another_are_refused(base: Bundle, tmp_path: Path) -> None:
    alice, bruno = base.adapter("alice"), base.adapter("bruno")
    swapped = edited(alice, tmp_path / "swapped", program=None, slots=bruno.as_adapter.variants.executorch.slots)
    backend = backends.load(base, "executorch", threads=1)
    with pytest.raises(AdapterError, match="cannot run adapter"):
        backend.new_cache(backend.read_adapter(swapped))


@pytest.mark.parametrize("file", ["adapter.ptd", "adapter-slots.pte"])
def test_damage_is_found_before_anything_is_computed(base: Bundle, tmp_path: Path, file: str) -> None:
    shutil.copytree(base.path, tmp_path / "base")
    copy = Bundle.open(tmp_path / "base")
    alone = edited(copy.adapter("alice"), tmp_path / "alone", program=None)
    backend = backends.load(copy, "executorch", threads=1)
    bundles.flip_byte((alone if file == "adapter.ptd" else copy).path / file, -1000)
    with pytest.raises(IntegrityError, match=f"{file}"):
        backend.read_adapter(alone)


def test_a_base_without_slots_takes_none(base: Bundle, tmp_path: Path) -> None:
    model = base.model
    assert isinstance(model, ModelManifest)
    variant = msgspec.structs.replace(model.variants.executorch, slots=None)
    with BundleWriter(tmp_path / "plain") as writer:
        for file in model.files:
            if "onnx" not in file.path and "adapter" not in file.path:
                writer.add_file(file.path, base.file(file.path))
        writer.finish(msgspec.structs.replace(model, variants=Variants(executorch=variant), adapters=[]))
    plain = Bundle.open(tmp_path / "plain")
    alone = edited(base.adapter("alice"), tmp_path / "alone", program=None)
    backend = backends.load(plain, "executorch", threads=1)
    with pytest.raises(AdapterError, match="without a program of its own"):
        backend.read_adapter(alone)
    with pytest.raises(AdapterError, match="no adapter slots"):
        convert_adapter(programs.made().adapters[0], plain, tmp_path / "converted")
    with Engine(backend, None, plain) as engine, pytest.raises(AdapterError, match="no slots for adapters"):  # type: ignore[arg-type]
        customize(engine, EXAMPLES, pool_for(base, tmp_path / "pool"))


def test_a_variant_that_says_nothing_of_a_program_is_refused(base: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="neither a program nor slots"):
        edited(base.adapter("alice"), tmp_path / "alone", program=None, slots=None)


# Customizing


def pool_for(base: Bundle, out: Path, *, rank: int = 2, **changes: Any) -> Pool:
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in {"self_attn.q_proj": (64, 80), "mlp.down_proj": (160, 64)}.items()
    }
    adapters = pools.loras(shapes=shapes, gain=0.3, rank=rank)
    return pools.write(
        out, adapters=adapters, located=pools.projection(3, 64), base=base.model.base_fingerprint, **changes
    )


@pytest.fixture(scope="module")
def engine(base: Bundle) -> Any:
    with Engine.load(base, backend="executorch", threads=1) as engine:
        yield engine


@pytest.fixture
def easily_pleased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random adapters make random answers worse, which is not what is tested here."""
    monkeypatch.setattr("crayon_runtime.customize.TOLERANCE", 100.0)


def test_a_pool_on_the_device_and_a_service_give_the_same_adapter(
    engine: Engine, base: Bundle, slots: ExecutorchSlots, tmp_path: Path, easily_pleased: None
) -> None:
    pool = pool_for(base, tmp_path / "pool")
    here = customize(engine, EXAMPLES, pool, folder=tmp_path / "here", digits=4)
    assert here.installed, here.reason
    assert engine.adapter == "customized"
    with services.real(pool, None, tmp_path / "cache") as url, PoolClient(url, trusted=None) as client:
        there = customize(engine, EXAMPLES, client, folder=tmp_path / "there")
    assert there.installed, there.reason
    assert there.logit_change == here.logit_change > 0.01
    mine, theirs = (Bundle.open(tmp_path / name / "adapter") for name in ("here", "there"))
    assert data_of(mine) == data_of(theirs)
    assert {file.path for file in theirs.manifest.files} == {"adapter.ptd"}
    assert backends.served(theirs) == ["executorch"]
    sent = there.sent
    assert sent["backend"] == "executorch"
    assert sent["slots"] == {name: value for name, value in msgspec.to_builtins(slots).items() if name != "program"}
    assert len(json.dumps(sent)) < 2048
    expected = write_adapter_bundle(
        pool.blend(np.array(here.alpha, np.float32)), tmp_path / "expected", name="expected",
        base_fingerprint=base.model.base_fingerprint, dtype=None, executorch=Slots(slots),
    )  # fmt: skip
    assert data_of(mine) == data_of(expected)


def test_a_blend_of_a_larger_rank_is_truncated_to_the_slots(
    engine: Engine, base: Bundle, slots: ExecutorchSlots, tmp_path: Path, easily_pleased: None
) -> None:
    pool = pool_for(base, tmp_path / "pool", rank=4, blend="concat")
    done = customize(engine, EXAMPLES, pool, folder=tmp_path / "here")
    assert done.installed, done.reason
    targets = Bundle.open(tmp_path / "here/adapter").as_adapter.targets
    assert {target.rank for target in targets} <= {4, slots.rank}


def test_an_auto_backend_is_one_that_takes_the_adapter(
    base: Bundle, tmp_path: Path, easily_pleased: None, engine: Engine
) -> None:
    folder = state_folder(tmp_path / "bundle")
    assert backend_for(base, "auto", folder) == "auto"
    assert backend_for(base, "onnx", folder) == "onnx"
    assert customize(engine, EXAMPLES, pool_for(base, tmp_path / "pool"), folder=folder).installed
    assert backend_for(base, "auto", folder) == "executorch"


def test_what_slots_decide_is_not_asked_of_a_service(engine: Engine, base: Bundle, tmp_path: Path) -> None:
    pool = pool_for(base, tmp_path / "pool")
    with (
        services.real(pool, None, tmp_path / "cache") as url,
        PoolClient(url, trusted=None) as client,
        pytest.raises(InvalidInput, match="dtype is not for ExecuTorch"),
    ):
        customize(engine, EXAMPLES, client, folder=tmp_path / "there", dtype="fp16")


def test_a_service_refuses_slots_that_do_not_fit_its_pool(base: Bundle, slots: ExecutorchSlots, tmp_path: Path) -> None:
    httpx = needs.module("httpx")
    pool = pool_for(base, tmp_path / "pool")
    shape = {name: value for name, value in msgspec.to_builtins(slots).items() if name != "program"}
    others: list[tuple[dict[str, Any], int, str]] = [
        ({"slots": shape}, 409, "slots belong to"),
        ({"backend": "executorch"}, 409, "slots belong to"),
        ({"backend": "executorch", "slots": shape | {"layers": 1}}, 409, "it changes model.layers.1"),
        ({"backend": "executorch", "slots": shape | {"targets": shape["targets"][:1]}}, 409, "it changes"),
        ({"backend": "executorch", "slots": shape | {"layers": 4096, "rank": 4096}}, 409, "more than"),
        ({"backend": "executorch", "slots": shape | {"rank": 0}}, 422, "Expected `int` >= 1"),
    ]
    with services.real(pool, None, tmp_path / "cache") as url:
        body = {
            "base_fingerprint": pool.manifest.base_fingerprint,
            "pool_version": pool.manifest.version,
            "alpha": [1, 0, 0],
        }
        for change, status, says in others:
            answer = httpx.post(f"{url}/v1/customizations", json=body | change)
            assert (answer.status_code, says in answer.json()["error"]["what"]) == (status, True), answer.text
