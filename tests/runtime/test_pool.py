"""Pools on disk, and blends of them. Judge: sums of products written out in float64; peft's and ONNX Runtime's readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import (
    AdapterError,
    BundleError,
    IntegrityError,
    InvalidInput,
    ManifestError,
    OutputError,
    SchemaTooNew,
)
from crayon_runtime.pool import Pool, pool_version, write_adapter_bundle
from tests.runtime import bundles, pools

ALPHA = np.array([0.2, 0.5, 0.3], np.float32)
Q, DOWN = pools.SHAPES


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return pools.write(tmp_path / "pool")


def product(lora: pools.Lora, module: str) -> np.ndarray:
    a, b = lora[module]
    return b.astype(np.float64) @ a.astype(np.float64)


def exact(module: str) -> np.ndarray:
    return sum(w * product(lora, module) for w, lora in zip(ALPHA.astype(np.float64), pools.loras(), strict=True))


def test_what_was_written_is_read(pool: Pool) -> None:
    opened = Pool.open(pool.path, verify=True)
    assert opened.manifest == pool.manifest
    assert opened.manifest.version == pool_version(opened.manifest)
    for name, array in vars(pools.projection()).items():
        np.testing.assert_array_equal(getattr(opened.projection, name), array)
    for n, lora in enumerate(pools.loras()):
        for module, pair in lora.items():
            for found, written in zip(opened.lora(n)[module], pair, strict=True):
                np.testing.assert_array_equal(found, written)
                assert isinstance(found.base.base, np.memmap)
    assert opened.typical() == []
    with pytest.raises(InvalidInput, match="no adapter 3"):
        opened.lora(3)


def test_typical_texts(tmp_path: Path) -> None:
    texts = [{"cluster": n, "prompt": "half seven \u2028?", "completion": "日本 19:30"} for n in range(3)]
    pool = pools.write(tmp_path / "pool", typical=texts)
    assert Pool.open(pool.path, verify=True).typical() == texts


def test_each_adapter_is_a_peft_folder(pool: Pool) -> None:
    import peft

    config = peft.LoraConfig.from_pretrained(str(pool.path / "adapters/001"))
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 4, set(pools.SHAPES))
    tensors = load_file(pool.path / "adapters/001/adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[f"base_model.model.{Q}.lora_A.weight"], pools.loras()[1][Q][0])


def test_the_same_content_has_the_same_version(pool: Pool, tmp_path: Path) -> None:
    assert pools.write(tmp_path / "again").manifest.version == pool.manifest.version
    other = pools.write(tmp_path / "other", adapters=pools.loras(seed=1))
    assert other.manifest.version != pool.manifest.version


def test_half_precision_adapters(tmp_path: Path) -> None:
    halves = [{m: (a.astype(np.float16), b.astype(np.float16)) for m, (a, b) in x.items()} for x in pools.loras()]
    pool = pools.write(tmp_path / "pool", adapters=halves)
    assert pool.lora(0)[Q][0].dtype == np.float16
    a, b = pool.blend(ALPHA, "concat").tensors[Q]
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(b @ a, exact(Q), atol=5e-3)


def test_separate_is_the_sum_of_each_factor(pool: Pool) -> None:
    blended = pool.blend(ALPHA)
    assert (blended.mode, blended.rank, blended.scale, set(blended.tensors)) == ("separate", 2, 2.0, set(pools.SHAPES))
    for module, found in blended.tensors.items():
        for side in (0, 1):
            expected = sum(w * lora[module][side] for w, lora in zip(ALPHA, pools.loras(), strict=True))
            np.testing.assert_allclose(found[side], expected, rtol=1e-5, atol=1e-6)


def test_concat_is_the_sum_of_the_products(pool: Pool) -> None:
    blended = pool.blend(ALPHA, "concat")
    assert blended.rank == 6
    for module, (a, b) in blended.tensors.items():
        np.testing.assert_allclose(b @ a, exact(module), atol=1e-5)
    assert blended.error < 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_svd_is_the_best_of_its_rank(pool: Pool, rank: int) -> None:
    blended = pool.blend(ALPHA, "svd", rank)
    lost = total = 0.0
    for module, (a, b) in blended.tensors.items():
        inside, kept, outside = blended.shape(module)
        assert (a.shape, b.shape) == ((kept, inside), (outside, kept))
        u, s, vt = np.linalg.svd(exact(module))
        np.testing.assert_allclose(b @ a, (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-5)
        lost, total = lost + float((s[kept:] ** 2).sum()), total + float((s**2).sum())
    assert blended.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)


def test_svd_of_a_rank_that_a_matrix_does_not_have(tmp_path: Path) -> None:
    shapes = {Q: (3, 4)}
    pool = pools.write(tmp_path / "pool", adapters=pools.loras(shapes=shapes))
    blended = pool.blend(ALPHA, "svd", 6)
    assert blended.shape(Q) == (3, 3, 4)
    assert blended.error < 1e-6


def test_error_of_separate_is_what_it_says(pool: Pool) -> None:
    blended = pool.blend(ALPHA)
    wrong = sum(np.sum((b @ a - exact(module)) ** 2) for module, (a, b) in blended.tensors.items())
    right = sum(np.sum(exact(module) ** 2) for module in pools.SHAPES)
    assert blended.error == pytest.approx((wrong / right) ** 0.5, rel=1e-5)


def test_adapters_without_weight_take_no_rank(pool: Pool) -> None:
    blended = pool.blend([0, 1, 0], "concat")
    assert blended.rank == 2
    a, _ = blended.tensors[Q]
    np.testing.assert_array_equal(a, pools.loras()[1][Q][0])
    assert pool.blend([0, 0, 0]).error == 0
    assert not any(matrix.any() for matrix in pool.blend([0, 0, 0], "separate").tensors[Q])


@pytest.mark.parametrize(
    "alpha, options, message",
    [
        ([0.5, 0.5], {}, "this pool has 3 adapters"),
        ([0.5, float("nan"), 0.5], {}, "weight 1 is nan"),
        ([1e9, 0, 0], {}, "weight 0"),
        ([-0.5, 1, 0.5], {}, "weight 0"),
        (ALPHA, {"mode": "mean"}, "must be one of separate, concat, svd"),
        (ALPHA, {"mode": "separate", "rank": 2}, "a rank is for svd"),
        (ALPHA, {"mode": "svd", "rank": 7}, "from 1 to 6"),
        (ALPHA, {"mode": "svd", "rank": 0}, "from 1 to 6"),
    ],
)
def test_blends_that_cannot_be(pool: Pool, alpha: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        pool.blend(alpha, **options)


@pytest.mark.parametrize("mode", ["separate", "concat", "svd"])
def test_the_adapter_bundle_holds_the_blend(pool: Pool, tmp_path: Path, mode: Any) -> None:
    blended = pool.blend(ALPHA, mode)
    bundle = write_adapter_bundle(blended, tmp_path / "adapter", name="alice", base_fingerprint=bundles.BASE)
    Bundle.open(bundle.path, verify=True)
    manifest = bundle.as_adapter
    assert (manifest.name, manifest.base_fingerprint) == ("alice", bundles.BASE)
    assert {t.module: t.rank for t in manifest.targets} == {m: blended.shape(m)[1] for m in pools.SHAPES}
    read = ort.AdapterFormat.read_adapter(str(bundle.file("adapter.onnx_adapter"))).get_parameters()
    assert len(read) == 2 * len(pools.SHAPES)
    for module, (a, b) in blended.tensors.items():
        np.testing.assert_array_equal(read[f"{module}.lora_A.weight"].numpy(), a.T)
        np.testing.assert_array_equal(read[f"{module}.lora_B.weight"].numpy(), 2 * b.T)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["separate", "concat", "svd"])
def test_nan_in_an_adapter_is_refused_and_nothing_is_left(tmp_path: Path, value: float, mode: Any) -> None:
    damaged = pools.loras()
    damaged[2][DOWN][1][0, 0] = value
    pool = pools.write(tmp_path / "pool", adapters=damaged)
    with pytest.raises(AdapterError, match=f"{DOWN} holds NaN or infinity"):
        write_adapter_bundle(pool.blend(ALPHA, mode), tmp_path / "adapter", name="a", base_fingerprint=bundles.BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_a_flipped_byte_is_found_where_hashes_are_checked(pool: Pool) -> None:
    bundles.flip_byte(pool.path / "adapters/001/adapter_model.safetensors")
    Pool.open(pool.path)
    with pytest.raises(IntegrityError, match=r"adapters/001/adapter_model.safetensors is damaged, or of another build"):
        Pool.open(pool.path, verify=True)


def test_a_file_of_another_build(pool: Pool, tmp_path: Path) -> None:
    other = pools.write(tmp_path / "other", adapters=pools.loras(seed=1))
    file = "adapters/000/adapter_model.safetensors"
    shutil.copy(other.path / file, pool.path / file)
    with pytest.raises(IntegrityError, match="of another build"):
        Pool.open(pool.path, verify=True)
    document = json.loads((pool.path / "pool.json").read_bytes())
    document["files"] = json.loads((other.path / "pool.json").read_bytes())["files"]
    (pool.path / "pool.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="mixed from two builds|its version"):
        Pool.open(pool.path)


def test_an_adapter_of_another_base(pool: Pool, tmp_path: Path) -> None:
    other = pools.write(tmp_path / "other", base="c" * 64)
    file = "adapters/002/adapter_model.safetensors"
    shutil.copy(other.path / file, pool.path / file)
    with pytest.raises(AdapterError, match="of base cccccccccccc…, its pool of bbbbbbbbbbbb…"):
        Pool.open(pool.path)


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (lambda p: p.update(schema_version="2.0"), SchemaTooNew, "2.0"),
        (lambda p: p.pop("schema_version"), ManifestError, "schema_version"),
        (lambda p: p.update(rank=3), BundleError, "is not adapted with rank 3"),
        (lambda p: p.update(targets=[Q]), BundleError, "which pool.json does not name"),
        (lambda p: p["targets"].append("model.norm"), BundleError, "model.norm is not adapted"),
        (lambda p: p.update(adapters=4), ManifestError, "does not list adapters/003"),
        (lambda p: p.update(adapters=2), IntegrityError, "indicators"),
        (lambda p: p.update(dimensions=5), IntegrityError, "projection"),
        (lambda p: p["embedding"].update(residual=False), IntegrityError, "its version"),
        (lambda p: p["weighting"].update(temperature=0.5), IntegrityError, "its version"),
        (lambda p: p["weighting"].update(temperature=-1), ManifestError, "temperature"),
        (lambda p: p.update(kind="model"), ManifestError, "kind|model"),
        (lambda p: p["files"][0].update(path="../x"), ManifestError, "not a plain relative path"),
        (lambda p: p["files"][0].update(sha256="0" * 64), IntegrityError, "its version"),
    ],
)
def test_a_pool_json_that_contradicts_itself(pool: Pool, edit: Any, error: type[Exception], message: str) -> None:
    document = json.loads((pool.path / "pool.json").read_bytes())
    edit(document)
    (pool.path / "pool.json").write_text(json.dumps(document))
    with pytest.raises(error, match=message):
        Pool.open(pool.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'"' + b"[" * 100_000])
def test_a_pool_json_that_is_none(pool: Pool, content: bytes) -> None:
    (pool.path / "pool.json").write_bytes(content)
    with pytest.raises(ManifestError):
        Pool.open(pool.path)


@pytest.mark.parametrize("change", ["shorter", "missing", "link"])
def test_files_that_are_not_as_listed(pool: Pool, change: str) -> None:
    file = pool.path / "projection.safetensors"
    if change == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        moved = file.rename(pool.path.parent / "moved")
        if change == "link":
            file.symlink_to(moved)
    with pytest.raises(IntegrityError, match=r"projection.safetensors (has|cannot be read|is not a plain file)"):
        Pool.open(pool.path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0{",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{}",
        (65).to_bytes(8, "little") + b'{"mean": {"dtype": "F32", "shape": [8], "data_offsets": [0, 99]}}',
        (66).to_bytes(8, "little") + b'{"mean": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}' + bytes(16),
    ],
)
def test_a_projection_that_lies(pool: Pool, content: bytes) -> None:
    padded = content.ljust((pool.path / "projection.safetensors").stat().st_size, b" ") if content else content
    (pool.path / "projection.safetensors").write_bytes(padded)
    with pytest.raises(IntegrityError):
        Pool.open(pool.path)


def test_whole_numbers_are_no_adapter(tmp_path: Path) -> None:
    whole = [{m: (a.astype(np.int32), b.astype(np.int32)) for m, (a, b) in x.items()} for x in pools.loras()]
    with pytest.raises(BundleError, match="is not adapted with rank 2"):
        pools.write(tmp_path / "pool", adapters=whole)


def test_no_pool(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no pool here"):
        Pool.open(tmp_path / "nowhere")


def test_a_pool_is_replaced_only_when_asked_and_nothing_else_is(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        pools.write(pool.path)
    new = pools.write(pool.path, adapters=pools.loras(seed=1), replace=True)
    assert new.manifest.version != pool.manifest.version
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").touch()
    with pytest.raises(OutputError, match="is not a pool"):
        pools.write(tmp_path / "home", replace=True)


def test_a_pool_whose_arrays_are_not_what_it_says_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        pools.write(tmp_path / "pool", rank=3)
    assert not list(tmp_path.iterdir())
