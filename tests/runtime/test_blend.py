"""Judge: numpy's SVD and casts, and `pack`. What the modes mean is in test_pool.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from crayon_runtime.blend import Blended, _truncated, onnx_tensors
from crayon_runtime.bundle import install, pack, write_adapter_archive
from crayon_runtime.errors import AdapterError
from crayon_runtime.pool import write_adapter_bundle
from tests.runtime import bundles, pools

ALPHA = np.array([0.7, 0.2, 0.1], np.float32)
Q, DOWN = pools.SHAPES


def product(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    a, b = pair
    return b.astype(np.float64) @ a.astype(np.float64)


def distance(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", [(6, 16, 12), (16, 300, 200), (8, 5, 30), (8, 30, 5), (1, 4, 4)])
@pytest.mark.parametrize("nearly", [1.0, 1e-3], ids=["apart", "nearly the same"])
def test_truncation_is_that_of_numpys_svd(shape: tuple[int, int, int], nearly: float) -> None:
    m, inside, outside = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, inside)).astype(np.float32)
    b = rng.standard_normal((outside, m)).astype(np.float32)
    b[:, 1:] = b[:, :1] + nearly * b[:, 1:]
    exact = product((a, b))
    for rank in {1, min(2, m), min(shape)}:
        right = best(exact, rank)
        found = _truncated(a, b, rank)
        assert [x.shape for x in found] == [(rank, inside), (outside, rank)]
        assert distance(product(found), exact) <= distance(right, exact) + 3e-7
        assert distance(product(found), right) < 1e-4
        grams = found[0] @ found[0].T, found[1].T @ found[1]
        np.testing.assert_allclose(*grams, atol=1e-4 * float(grams[0].max()), err_msg="the roots are shared")


def test_truncation_of_what_has_a_smaller_rank() -> None:
    a, b = np.ones((4, 9), np.float32), np.ones((7, 4), np.float32)
    found = _truncated(a, b, 3)
    np.testing.assert_allclose(product(found), product((a, b)), rtol=1e-6)
    assert not any(array.any() for array in _truncated(a, 0 * b, 3))


@pytest.mark.parametrize("mode", ["separate", "concat"])
def test_a_limit_truncates_the_blend_itself(mode: str) -> None:
    blended = Blended.of(pools.loras(), ALPHA, 2.0, mode)  # type: ignore[arg-type]
    assert blended.limited(blended.rank) is blended
    limited = blended.limited(1)
    for module in pools.SHAPES:
        assert limited.shape(module)[1] == 1
        right = best(product(blended.tensors[module]), 1)
        assert distance(product(limited.tensors[module]), right) < 1e-5
    assert limited.error > blended.error


@pytest.mark.parametrize("mode", ["separate", "concat", "svd"])
def test_float16_pools_are_blended_in_float32(mode: str) -> None:
    halves = [
        {m: (a.astype(np.float16), (b * 1e-4).astype(np.float16)) for m, (a, b) in lora.items()}  # partly subnormal
        for lora in pools.loras()
    ]
    wide = [{m: (a.astype(np.float32), b.astype(np.float32)) for m, (a, b) in lora.items()} for lora in halves]
    ours, theirs = (Blended.of(loras, ALPHA, 2.0, mode) for loras in (halves, wide))  # type: ignore[arg-type]
    for module in pools.SHAPES:
        np.testing.assert_allclose(product(ours.tensors[module]), product(theirs.tensors[module]), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype, worst", [("fp32", 1e-7), ("fp16", 6e-4), ("int8", 2e-2)])
def test_what_each_dtype_costs(dtype: str, worst: float, tmp_path: Path) -> None:
    shapes = {Q: (64, 96), DOWN: (300, 40)}
    blended = Blended.of(pools.loras(rank=4, shapes=shapes), ALPHA, 2.0, "separate")
    bundle = write_adapter_bundle(
        blended, tmp_path / "adapter", name="a", base_fingerprint=bundles.BASE, dtype=dtype  # type: ignore[arg-type]
    )  # fmt: skip
    assert bundle.as_adapter.variants.onnx.dtype == dtype  # type: ignore[union-attr]
    stored = ort.AdapterFormat.read_adapter(str(bundle.file("adapter.onnx_adapter"))).get_parameters()
    assert len(stored) == (8 if dtype == "int8" else 4)
    for module, pair in blended.tensors.items():
        a, b = (stored[f"{module}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB")
        if dtype == "int8":
            a *= stored[f"{module}.lora_A.scale"].numpy()
            b *= stored[f"{module}.lora_B.scale"].numpy()[:, None]
        assert distance((a @ b).T, 2.0 * product(pair)) <= worst


def test_float16_that_does_not_hold_the_values(tmp_path: Path) -> None:
    blended = Blended.of(
        [{Q: (np.ones((1, 4), np.float32), np.full((4, 1), 4e4, np.float32))}], ALPHA[:1], 4.0, "separate"
    )
    with pytest.raises(AdapterError, match="float16 cannot"):
        write_adapter_bundle(blended, tmp_path / "a", name="a", base_fingerprint=bundles.BASE, dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    write_adapter_bundle(blended, tmp_path / "a", name="a", base_fingerprint=bundles.BASE, dtype="int8")


def test_an_archive_is_what_packing_the_bundle_gives(tmp_path: Path) -> None:
    blended = Blended.of(pools.loras(), ALPHA, 2.0, "separate")
    bundle = write_adapter_bundle(
        blended, tmp_path / "adapter", name="a", base_fingerprint=bundles.BASE, dtype="int8"
    )  # fmt: skip
    signature = b"signed"
    (bundle.path / "signature.json").write_bytes(signature)
    packed = pack(bundle.path, tmp_path / "packed.crayon").read_bytes()
    seen = []

    def sign(document: bytes) -> bytes:
        seen.append(document)
        return signature

    write_adapter_archive(
        tmp_path / "direct.crayon",
        onnx_tensors(blended),
        name="a",
        base_fingerprint=bundles.BASE,
        dtype="int8",
        sign=sign,
    )
    assert (tmp_path / "direct.crayon").read_bytes() == packed
    assert seen == [(bundle.path / "manifest.json").read_bytes()]
    install(tmp_path / "direct.crayon", tmp_path / "installed")
