"""The attention kernels against numpy, on every instruction set that this CPU has."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.native import kernels
from tests.native.kernels import LIBRARY

instructions = kernels.instructions
INTEGER_SETS = ("avx2_vnni", "avx512_vnni", "dotprod")
TYPES = {"fp32": (0, np.float32), "fp16": (1, np.float16), "int8": (2, np.int8)}
OK, BAD_SHAPE, HEAD_TOO_LARGE, BEYOND_CACHE = range(4)


class CacheSide(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zero_points")),
        *(
            (name, ctypes.c_int64)
            for name in ("position_stride", "head_stride", "scale_position_stride", "scale_head_stride")
        ),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("keys", CacheSide),
        ("values", CacheSide),
        ("type", ctypes.c_int32),
        *((n, ctypes.c_int64) for n in ("tokens", "query_heads", "cache_heads", "head_size", "start", "visible")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
    )


@dataclass
class Cache:
    """Keys or values [capacity, heads, head_size] with the scales that int8 needs."""

    kind: str
    data: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    zero_points: np.ndarray[Any, Any] | None = None
    written: int = 0  # positions

    @classmethod
    def empty(cls, kind: str, capacity: int, heads: int, head_size: int) -> Cache:
        dtype = TYPES[kind][1]
        # What no token was written to is garbage; no result may depend on it.
        data = np.full((capacity, heads, head_size), 99 if kind == "int8" else np.nan, dtype)
        return cls(kind, data, np.full((capacity, heads), np.nan, np.float32))

    def side(self) -> CacheSide:
        _, heads, head_size = self.data.shape
        zeros = None if self.zero_points is None else self.zero_points.ctypes.data
        return CacheSide(self.data.ctypes.data, self.scales.ctypes.data, zeros, heads * head_size, head_size, heads, 1)

    def update(self, rows: np.ndarray[Any, Any], start: int) -> int:
        capacity, heads, head_size = self.data.shape
        pointer = ctypes.c_void_p(rows.ctypes.data)
        self.written = max(self.written, start + len(rows))
        sizes = (ctypes.c_int64(n) for n in (len(rows), heads, head_size, start, capacity))
        return int(LIBRARY.test_update_cache(ctypes.byref(self.side()), TYPES[self.kind][0], pointer, *sizes))

    def floats(self) -> np.ndarray[Any, Any]:
        if self.kind != "int8":
            return self.data.astype(np.float64)
        zeros = 0 if self.zero_points is None else self.zero_points[..., None].astype(np.float64)
        return (self.data - zeros) * self.scales[..., None].astype(np.float64)


def attend(query, keys, values, start, *, causal=True, mask=None, visible=None, threads=3, workspace=1):
    tokens, heads, head_size = query.shape
    visible = start + tokens if visible is None else visible
    output = np.full_like(query, np.nan)
    call = Attention(
        query.ctypes.data,
        output.ctypes.data,
        keys.side(),
        values.side(),
        TYPES[keys.kind][0],
        *(tokens, heads, keys.data.shape[1], head_size, start, visible),
        head_size**-0.5,
        causal,
        None if mask is None else mask.ctypes.data,
        0 if mask is None else mask.shape[1],
    )
    return LIBRARY.test_attend(ctypes.byref(call), threads, workspace), output


def reference(query, keys, values, start, *, causal=True, mask=None, visible=None):
    """Softmax attention in float64, as the textbook writes it."""
    tokens, heads, head_size = query.shape
    visible = start + tokens if visible is None else visible
    group = heads // keys.data.shape[1]
    k = np.repeat(keys.floats()[:visible], group, axis=1)
    v = np.repeat(values.floats()[:visible], group, axis=1)
    scores = np.einsum("thd,phd->htp", query.astype(np.float64), k) * head_size**-0.5
    if mask is not None:
        scores = scores + mask[None]
    if causal:
        scores[:, np.arange(visible)[None] > start + np.arange(tokens)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("htp,phd->thd", weights / weights.sum(-1, keepdims=True), v)


def check(output, expected, query, keys, values, instructions):
    """Floats agree to their rounding; integer arithmetic (``INTEGER_SETS``, int8) to that of its whole numbers.

    It rounds a query to 1 / 32512 of its largest element and weights, times the scales of the values, to 1 / 32512 of
    their largest in a block of 128 positions. Errors of single elements are random and mostly cancel: what is left is
    below 2e-4 of the largest value, or grows with the scores where those are large.
    """
    if keys.kind != "int8" or instructions not in INTEGER_SETS:
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-6)
        return
    largest_value, largest_key = (np.abs(c.floats()[: c.written]).max() for c in (values, keys))
    np.testing.assert_allclose(
        output, expected, rtol=0, atol=2e-4 * largest_value * max(1.0, 0.1 * np.abs(query).max() * largest_key)
    )


def filled(kind, positions, heads, head_size, rng, capacity=None):
    """Keys and values with `positions` positions written."""
    sides = []
    for _ in range(2):
        cache = Cache.empty(kind, capacity or positions, heads, head_size)
        assert cache.update(rng.standard_normal((positions, heads, head_size), np.float32), 0) == OK
        sides.append(cache)
    return sides


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("head_size", [8, 16, 32, 40, 64, 80, 96, 100, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_shapes(kind, head_size, group, instructions):
    rng = np.random.default_rng(head_size * 10 + group)
    for tokens, start in [(1, 0), (1, 1), (1, 63), (1, 64), (1, 130), (5, 0), (33, 0), (7, 61), (70, 65)]:
        heads = int(rng.integers(1, 4))
        keys, values = filled(kind, start + tokens, heads, head_size, rng, capacity=start + tokens + 3)
        query = rng.standard_normal((tokens, heads * group, head_size), np.float32)
        status, output = attend(query, keys, values, start)
        assert status == OK
        check(output, reference(query, keys, values, start), query, keys, values, instructions)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("position", [1, 2, 15, 16, 127, 128, 255, 256, 257, 1000, 2047, 4095])
@pytest.mark.parametrize("workspace", [0, 1])
def test_decode_at_any_position(kind, position, workspace, instructions):
    rng = np.random.default_rng(position)
    keys, values = filled(kind, position + 1, 2, 64, rng, capacity=4096)
    query = 3 * rng.standard_normal((1, 16, 64), np.float32)
    for threads in 1, 2, 16:
        status, output = attend(query, keys, values, position, threads=threads, workspace=workspace)
        assert status == OK
        check(output, reference(query, keys, values, position), query, keys, values, instructions)


@pytest.mark.parametrize("kind", TYPES)
def test_prefill_in_pieces_is_prefill(kind, instructions):
    rng = np.random.default_rng(1)
    rows, heads, head_size = 150, 4, 48
    fresh = [rng.standard_normal((rows, heads, head_size), np.float32) for _ in range(2)]
    query = rng.standard_normal((rows, 2 * heads, head_size), np.float32)
    whole = [Cache.empty(kind, 200, heads, head_size) for _ in range(2)]
    pieces = [Cache.empty(kind, 200, heads, head_size) for _ in range(2)]
    for cache, data in zip(whole, fresh, strict=True):
        assert cache.update(data, 0) == OK
    _, expected = attend(query, *whole, 0)
    start = 0
    for size in 1, 31, 64, 1, 53:
        for cache, data in zip(pieces, fresh, strict=True):
            assert cache.update(data[start : start + size], start) == OK
        _, output = attend(query[start : start + size], *pieces, start)
        check(output, expected[start : start + size], query, *whole, instructions)
        start += size


@pytest.mark.parametrize("head_size", [8, 64, 100, 128, 256])
@pytest.mark.parametrize("tokens, heads", [(1, 8), (1, 2), (40, 4)])
def test_zero_points(head_size, tokens, heads, instructions):
    rng = np.random.default_rng(head_size + tokens)
    keys, values = filled("int8", 290, 2, head_size, rng)
    for cache in keys, values:
        cache.data = rng.integers(-128, 128, cache.data.shape, np.int8)
        cache.scales = (0.005 + 0.01 * rng.random((290, 2))).astype(np.float32)
        cache.zero_points = rng.integers(-128, 128, (290, 2), np.int8)
    query = rng.standard_normal((tokens, heads, head_size), np.float32)
    _, output = attend(query, keys, values, 290 - tokens)
    # Sums of products with the zero points cancel: in floats too, a little is lost there.
    expected = reference(query, keys, values, 290 - tokens)
    if instructions in INTEGER_SETS:
        check(output, expected, query, keys, values, instructions)
    else:
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("head_size", [64, 256])
@pytest.mark.parametrize("key", [-128, 127])
def test_the_largest_integers(head_size, key, instructions):
    """Sums of the largest products stay in range, and a constant is averaged to itself."""
    rng = np.random.default_rng(8)
    keys, values = filled("int8", 600, 1, head_size, rng)
    for cache, zero in (keys, 0), (values, -128):
        cache.scales[:] = 0.01
        cache.zero_points = np.full(cache.scales.shape, zero, np.int8)
    keys.data[:] = key
    values.data[:] = 127
    for sign in 1, -1:
        query = np.full((1, 8, head_size), np.float32(sign))
        _, output = attend(query, keys, values, 599)
        np.testing.assert_allclose(output, 2.55, rtol=1e-6)
        keys.data[300] = -key - 1  # one position with all the weight, or with none
        _, output = attend(100 * query, keys, values, 599)
        check(output, reference(100 * query, keys, values, 599), query, keys, values, instructions)
        keys.data[300] = key


def test_int8_rows_of_very_different_size(instructions):
    rng = np.random.default_rng(9)
    magnitudes = 10.0 ** rng.uniform(-4, 0, (500, 2, 1))
    keys, values = (Cache.empty("int8", 500, 2, 64) for _ in range(2))
    for cache in keys, values:
        rows = (magnitudes * rng.standard_normal((500, 2, 64))).astype(np.float32)
        rows[100:140] = 0
        assert cache.update(rows, 0) == OK
    query = rng.standard_normal((3, 8, 64), np.float32)
    query[1, 2] = 0
    _, output = attend(query, keys, values, 497)
    check(output, reference(query, keys, values, 497), query, keys, values, instructions)


@pytest.mark.parametrize("kind", TYPES)
def test_masks(kind, instructions):
    rng = np.random.default_rng(3)
    keys, values = filled(kind, 300, 2, 32, rng)
    query = rng.standard_normal((9, 4, 32), np.float32)
    mask = rng.standard_normal((9, 300), np.float32)
    mask[:, 100:250] = -np.inf
    options = {"causal": False, "mask": mask, "visible": 300}
    _, output = attend(query, keys, values, 0, **options)
    check(output, reference(query, keys, values, 0, **options), query, keys, values, instructions)
    _, output = attend(query, keys, values, 0, causal=False, visible=200)
    check(output, reference(query, keys, values, 0, causal=False, visible=200), query, keys, values, instructions)
    mask[4] = -np.inf
    _, output = attend(query, keys, values, 0, **options)
    assert (output[4] == 0).all()
    assert np.isfinite(output).all()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 3000.0])
def test_scores_of_any_magnitude(scale, kind, instructions):
    rng = np.random.default_rng(4)
    keys, values = filled(kind, 200, 1, 64, rng)
    query = np.float32(scale) * rng.standard_normal((1, 8, 64), np.float32)
    _, output = attend(query, keys, values, 199)
    if kind == "int8" and instructions in INTEGER_SETS:
        check(output, reference(query, keys, values, 199), query, keys, values, instructions)
        return
    # Scores are float32: their own rounding, in the exponent, is what may differ.
    np.testing.assert_allclose(output, reference(query, keys, values, 199), atol=2e-6 * max(1, scale), rtol=1e-5)


def test_half_is_rounded_as_numpy_rounds():
    rng = np.random.default_rng(5)
    magnitudes = 10.0 ** rng.uniform(-9, 6, (50, 3, 37))
    rows = (magnitudes * rng.choice([-1, 1], magnitudes.shape)).astype(np.float32)
    rows[0, 0, :6] = [0, -0.0, np.inf, -np.inf, 65504, 65520]
    cache = Cache.empty("fp16", 50, 3, 37)
    assert cache.update(rows, 0) == OK
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(cache.data.view(np.uint16), rows.astype(np.float16).view(np.uint16))


def test_int8_is_rounded_to_nearest():
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((40, 2, 64), np.float32)
    rows[3, 1] = 0
    cache = Cache.empty("int8", 41, 2, 64)
    assert cache.update(rows, 1) == OK
    largest = np.abs(rows).max(-1)
    np.testing.assert_allclose(cache.scales[1:], np.where(largest > 0, largest / 127, 1), rtol=1e-6)
    assert np.abs(cache.floats()[1:] - rows).max() <= 0.5001 * cache.scales[1:].max()
    assert (cache.data[4, 1] == 0).all()
    assert np.abs(cache.data[1:]).max() == 127


def test_errors():
    rng = np.random.default_rng(7)
    keys, values = filled("fp32", 10, 2, 16, rng)
    rows = rng.standard_normal((4, 2, 16), np.float32)
    assert keys.update(rows, 7) == BEYOND_CACHE
    assert keys.update(rows, -1) == BEYOND_CACHE
    assert attend(np.zeros((1, 3, 16), np.float32), keys, values, 0)[0] == BAD_SHAPE
    assert attend(np.zeros((1, 2, 16), np.float32), keys, values, -1)[0] == BEYOND_CACHE
    assert attend(np.zeros((2, 2, 16), np.float32), keys, values, 5, visible=6)[0] == BEYOND_CACHE
    wide = filled("fp32", 2, 1, 264, rng)
    assert attend(np.zeros((1, 1, 264), np.float32), *wide, 0)[0] == HEAD_TOO_LARGE
