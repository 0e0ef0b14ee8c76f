"""The kernels of elementwise operations against numpy, on every instruction set that this CPU has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.native import kernels
from tests.native.kernels import LIBRARY

Array = np.ndarray[Any, Any]
instructions = kernels.instructions

BINARY: dict[int, Callable[[Array, Array], Array]] = {0: np.add, 1: np.subtract, 2: np.multiply}
UNARY: dict[int, Callable[[Array], Array]] = {
    3: np.negative,
    4: np.square,
    5: lambda x: 1 / (1 + np.exp(-x.astype(np.float64))),
    6: lambda x: 1 / np.sqrt(x.astype(np.float64)),
    7: np.copy,
}


class Shape(ctypes.Structure):
    _fields_ = (("sizes", ctypes.c_int64 * 4), ("dims", ctypes.c_int))

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Shape:
        return cls((ctypes.c_int64 * 4)(*shape, *[1] * (4 - len(shape))), len(shape))


def _apply(operation: int, a: Array, b: Array) -> Array | None:
    out, shape = np.full(4096, np.nan, np.float32), Shape()
    arguments = [ctypes.c_void_p(a.ctypes.data), ctypes.byref(Shape.of(a.shape))]
    arguments += [ctypes.c_void_p(b.ctypes.data), ctypes.byref(Shape.of(b.shape))]
    if LIBRARY.test_elementwise(operation, *arguments, ctypes.c_void_p(out.ctypes.data), ctypes.byref(shape)):
        return None
    sizes = tuple(shape.sizes[: shape.dims])
    count = int(np.prod(sizes))
    assert np.isnan(out[count:]).all()
    return out[:count].reshape(sizes)


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize(
    "a, b",
    [
        ((7,), (7,)),
        ((1, 1, 200), (1, 1, 200)),
        ((1, 2, 1), (1, 2, 33)),
        ((1, 2, 33), (1, 2, 1)),
        ((2, 3, 64), (64,)),
        ((1,), (1, 3, 5)),
        ((1, 2, 3, 64), (2, 1, 64)),
        ((2, 1, 16), (1, 2, 4, 16)),
        ((2, 1, 3, 1), (1, 4, 1, 5)),
        ((1, 1, 1), (1,)),
    ],
)
def test_two_operands_are_broadcast(operation: int, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(operation)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in (a, b))
    got = _apply(operation, x, y)
    assert got is not None
    np.testing.assert_array_equal(got, BINARY[operation](x, y))


def test_shapes_that_do_not_fit() -> None:
    assert _apply(0, np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)) is None


@pytest.mark.parametrize("operation", UNARY)
@pytest.mark.parametrize("count", [1, 5, 16, 47, 1000])
def test_one_operand(operation: int, count: int) -> None:
    x = np.random.default_rng(count).uniform(-30, 30, count).astype(np.float32)
    x[0] = 700.0
    x = np.abs(x) if operation == 6 else x
    got = _apply(operation, x, x)
    assert got is not None
    np.testing.assert_allclose(got, UNARY[operation](x), rtol=4e-7, atol=2e-7)


def test_the_ends_of_the_sigmoid() -> None:
    x = np.array([-3e38, -1000, -88, -87, 0, 20, 88, 1000, 3e38], np.float32)
    got = _apply(5, x, x)
    assert got is not None
    np.testing.assert_allclose(got, [0, 0, 0, 0, 0.5, 1, 1, 1, 1], atol=1e-8)


@pytest.mark.parametrize("a, b, axis", [((1, 2, 3, 4), (1, 2, 3, 4), 3), ((2, 5), (2, 1), 1), ((3, 2), (4, 2), 0)])
def test_concatenate(a: tuple[int, ...], b: tuple[int, ...], axis: int) -> None:
    x, y = np.arange(np.prod(a), dtype=np.float32).reshape(a), -np.arange(np.prod(b), dtype=np.float32).reshape(b)
    wanted = np.concatenate((x, y), axis)
    out = np.zeros_like(wanted)
    LIBRARY.test_concatenate(
        ctypes.c_void_p(x.ctypes.data), ctypes.byref(Shape.of(a)), ctypes.c_void_p(y.ctypes.data),
        ctypes.byref(Shape.of(b)), axis, ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    np.testing.assert_array_equal(out, wanted)
