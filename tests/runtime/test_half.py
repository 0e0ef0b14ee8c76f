"""Judge: numpy's own casts."""

from __future__ import annotations

import numpy as np
import pytest

from crayon_runtime import half

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def test_every_float16_becomes_the_same_float32_and_comes_back() -> None:
    wide = np.empty(FINITE.shape, np.float32)
    assert half.to_float(FINITE, wide)
    np.testing.assert_array_equal(wide.view(np.uint32), FINITE.astype(np.float32).view(np.uint32))
    back = half.from_float(wide)
    assert back is not None
    np.testing.assert_array_equal(back.view(np.uint16), FINITE.view(np.uint16))


def test_a_scale_is_rounded_once() -> None:
    wide = np.empty(FINITE.shape, np.float32)
    scale = np.float32(0.3)
    assert half.to_float(FINITE, wide, float(scale))
    np.testing.assert_array_equal(wide, FINITE.astype(np.float32) * scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_said(value: float) -> None:
    assert not half.to_float(np.array([1, value], np.float16), np.empty(2, np.float32))
    assert half.from_float(np.array([1, value], np.float32)) is None


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rounding_is_to_nearest_even(size: float) -> None:
    values = (np.random.default_rng(0).standard_normal((200, 300)) * size).astype(np.float32)
    normal = np.abs(values) >= np.finfo(np.float16).smallest_normal
    values[0, :2] = 1 + 2**-11, 1 + 3 * 2**-11  # between two float16
    for array, normals in ((values, normal), (values.T, normal.T)):
        rounded = half.from_float(array)
        assert rounded is not None
        np.testing.assert_array_equal(rounded[normals], array.astype(np.float16)[normals])
        error = np.abs(rounded.astype(np.float64) - array)
        assert (error <= np.maximum(2.0**-11 * np.abs(array), 2.0**-25 * (1 + 2**-12))).all()


def test_the_largest_that_fits() -> None:
    fits = half.from_float(np.array([65519.0, -65519.0], np.float32))
    assert fits is not None
    assert fits.tolist() == [65504.0, -65504.0]
    assert half.from_float(np.array([65520.0], np.float32)) is None


def test_nothing_is_nothing() -> None:
    assert half.to_float(np.empty((0, 3), np.float16), np.empty((0, 3), np.float32))
    empty = half.from_float(np.empty((3, 0), np.float32))
    assert empty is not None
    assert empty.shape == (3, 0)
