"""The kernels of quantized linear layers against numpy, on every instruction set that this CPU has."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.native import kernels
from tests.native.kernels import LIBRARY

Array = np.ndarray[Any, Any]
instructions = kernels.instructions


class Weights(NamedTuple):
    codes: Array
    """int8 [rows, width]: -8..7, or -128..127 with one scale a row."""
    scales: Array
    """float32 [rows, groups], of groups the values of bfloat16."""
    group_size: int
    """0: int8."""

    def stored(self) -> tuple[Array, Array]:
        """As they lie in a file, with garbage behind them that nothing may depend on."""
        if self.group_size == 0:
            return _guarded(self.codes.view(np.uint8)), _guarded(self.scales)
        unsigned = (self.codes + 8).astype(np.uint8)
        halves = (self.scales.view(np.uint32) >> 16).astype(np.uint16)
        return _guarded(unsigned[:, 1::2] << 4 | unsigned[:, ::2]), _guarded(halves)

    def exact(self) -> Array:
        rows, width = self.codes.shape
        groups = self.codes.reshape(rows, -1, self.group_size or width).astype(np.float64)
        return (groups * self.scales[:, :, None].astype(np.float64)).reshape(rows, width)


def _guarded(values: Array) -> Array:
    """A copy that ends where a page ends that cannot be read further, as the last tensor of a file does."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    pages = -(-flat.nbytes // 4096) * 4096
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    start = libc.mmap(None, pages + 4096, 3, 0x22, -1, 0)  # PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
    assert libc.mprotect(ctypes.c_void_p(start + pages), 4096, 0) == 0
    held = (ctypes.c_uint8 * flat.nbytes).from_address(start + pages - flat.nbytes)
    array = np.frombuffer(held, np.uint8)
    array[:] = flat
    return array


def _weights(rng: np.random.Generator, rows: int, width: int, group_size: int) -> Weights:
    if group_size == 0:
        codes = rng.integers(-128, 128, (rows, width), dtype=np.int8)
        return Weights(codes, rng.uniform(1e-3, 1e-2, (rows, 1)).astype(np.float32), 0)
    codes = rng.integers(-8, 8, (rows, width), dtype=np.int8)
    scales = rng.uniform(1e-3, 1e-2, (rows, width // group_size)).astype(np.float32)
    return Weights(codes, (scales.view(np.uint32) & 0xFFFF0000).view(np.float32), group_size)


def _rounded(x: Array) -> Array:
    """What tokens are worth after rounding: XNNPACK's rule, in its float32."""
    one = np.float32(1)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    factor = np.where(low == high, one, np.float32(255) / np.where(low == high, one, high - low)).astype(np.float32)
    low_end, high_end = low * factor, high * factor
    below = (np.float32(-128) + low_end) + (np.float32(127) + high_end) > 0
    zero = np.rint(np.clip(np.where(below, np.float32(-128) - low_end, np.float32(127) - high_end), -128, 127))
    q = np.rint(np.clip(x * factor[:, None], -128 - zero[:, None], 127 - zero[:, None])) + zero[:, None]
    return np.asarray((q - zero[:, None]) * (one / factor)[:, None].astype(np.float64))


def _multiply(x: Array, *weights: Weights, threads: int = 2, repetitions: int = 1) -> list[Array]:
    stored = [w.stored() for w in weights]
    outs = [np.full((len(x), len(w.codes)), np.nan, np.float32) for w in weights]

    def pointers(arrays: list[Array]) -> Any:
        return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))

    def numbers(values: list[int]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    LIBRARY.test_linears(
        len(weights),
        pointers([codes for codes, _ in stored]),
        pointers([scales for _, scales in stored]),
        numbers([len(w.codes) for w in weights]),
        numbers([w.group_size for w in weights]),
        ctypes.c_int64(x.shape[1]),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_int64(len(x)),
        pointers(outs),
        threads,
        repetitions,
    )
    return outs


def _agree(got: Array, x: Array, weights: Weights) -> None:
    wanted = _rounded(x) @ weights.exact().T
    assert np.abs(got - wanted).max() <= 3e-6 * np.abs(_rounded(x)).max() * np.abs(weights.exact()).sum(1).max()


def _tokens(rng: np.random.Generator, count: int, width: int) -> Array:
    x = rng.standard_normal((count, width)).astype(np.float32)
    x[::2] += 0.7  # so that zero points differ
    return x


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize(
    "group_size, width", [(32, 64), (32, 96), (32, 1056), (64, 576), (128, 128), (128, 640), (256, 512)]
)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 200])
def test_int4(tokens: int, group_size: int, width: int, rows: int) -> None:
    rng = np.random.default_rng(rows * width + tokens)
    x, w = _tokens(rng, tokens, width), _weights(rng, rows, width, group_size)
    _agree(_multiply(x, w)[0], x, w)


@pytest.mark.parametrize("tokens", [1, 2, 9, 17])
@pytest.mark.parametrize(
    "rows, width",
    [(1, 1), (4, 64), (16, 2048), (64, 16), (70, 5), (333, 8), (16, 100), (300, 257), (400, 1024), (257, 300)],
)
def test_int8(tokens: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(rows * width + tokens)
    x, w = _tokens(rng, tokens, width), _weights(rng, rows, width, 0)
    _agree(_multiply(x, w)[0], x, w)


@pytest.mark.parametrize("tokens", [1, 20])
def test_several_products_of_the_same_tokens(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = _tokens(rng, tokens, 384)
    weights = [_weights(rng, rows, 384, group) for rows, group in ((300, 32), (40, 0), (90, 32), (17, 128))]
    for got, w in zip(_multiply(x, *weights, threads=3), weights, strict=True):
        _agree(got, x, w)


@pytest.mark.parametrize("tokens", [1, 8])
def test_threads_and_repetitions_change_nothing(tokens: int) -> None:
    """The first product computes the sums of rows on the way, later ones have them."""
    rng = np.random.default_rng(3)
    x, w = _tokens(rng, tokens, 256), _weights(rng, 500, 256, 64)
    once = _multiply(x, w, threads=1)[0]
    for threads, repetitions in ((2, 1), (4, 1), (1, 2), (3, 3)):
        np.testing.assert_array_equal(_multiply(x, w, threads=threads, repetitions=repetitions)[0], once)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_tokens_without_variety(value: float) -> None:
    rng = np.random.default_rng(1)
    x = np.full((2, 128), value, np.float32)
    w = _weights(rng, 24, 128, 32)
    _agree(_multiply(x, w)[0], x, w)


def test_a_scale_of_zero_and_extreme_codes() -> None:
    x = np.full((3, 64), 127.0, np.float32)
    x[:, 0] = -128.0
    codes = np.full((20, 64), -8, np.int8)
    codes[1::2] = 7
    w = Weights(codes, np.zeros((20, 2), np.float32), 32)
    assert not _multiply(x, w)[0].any()
    w = Weights(codes, np.ones((20, 2), np.float32), 32)
    _agree(_multiply(x, w)[0], x, w)
    w = Weights(np.full((20, 64), -128, np.int8), np.ones((20, 1), np.float32), 0)
    _agree(_multiply(x, w)[0], x, w)
