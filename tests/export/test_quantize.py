"""Judge: ONNX Runtime's own quantizers, and the definition."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from crayon_export.quantize import Blockwise


def _by_onnxruntime(weights: np.ndarray, blockwise: Blockwise) -> tuple[np.ndarray, np.ndarray]:
    rows, width = weights.shape
    groups = blockwise.groups(width)
    codes = np.zeros((rows, groups, blockwise.group_size * blockwise.bits // 8), np.uint8)
    scales = np.zeros(rows * groups, np.float32)
    zero_points = np.zeros(rows * groups, np.uint8)
    quantize = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[blockwise.bits]
    columns = np.ascontiguousarray(weights.T)
    quantize(codes, columns, scales, zero_points, blockwise.group_size, rows, width, True)
    return codes, scales.reshape(rows, groups)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_and_scales_are_those_of_onnxruntime(bits: int, group_size: int) -> None:
    weights = np.random.default_rng(0).standard_normal((48, 3 * group_size)).astype(np.float32)
    weights[3] = 0
    weights[4, :group_size] = -weights[4, :group_size].clip(0)
    blockwise = Blockwise(bits, group_size)

    codes, scales = blockwise.quantize(weights)

    expected_codes, expected_scales = _by_onnxruntime(weights, blockwise)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected_codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [8, 96, 172])
def test_a_width_that_the_group_does_not_divide(bits: int, width: int) -> None:
    weights = np.random.default_rng(1).standard_normal((5, width)).astype(np.float32)
    blockwise = Blockwise(bits, 64)
    q = blockwise.quantize(weights)
    _, expected_scales = _by_onnxruntime(weights, blockwise)

    assert q.codes.shape == (5, -(-width // 64), 64 * bits // 8)
    np.testing.assert_array_equal(q.scales, expected_scales)
    assert blockwise.dequantize(q, width).shape == weights.shape
    assert blockwise.nbytes(5, width) == q.codes.nbytes + q.scales.nbytes


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_at_most_half_a_step_and_the_largest_weight_is_exact(bits: int) -> None:
    weights = np.random.default_rng(2).standard_normal((16, 128)).astype(np.float32)
    blockwise = Blockwise(bits, 32)
    q = blockwise.quantize(weights)
    restored = blockwise.dequantize(q, 128)

    grouped, error = weights.reshape(16, 4, 32), np.abs(weights - restored).reshape(16, 4, 32)
    step = np.abs(q.scales)[..., None]
    # One side of the range is a step short of the other; what lies beyond is clipped by up to a whole step.
    clipped = grouped / q.scales[..., None] > (1 << (bits - 1)) - 1.5
    assert (error[~clipped] <= (0.5 * step * np.ones_like(error))[~clipped] * 1.0001).all()
    assert (error <= step * 1.0001).all()
    largest = np.abs(grouped).argmax(axis=2)[..., None]
    np.testing.assert_allclose(np.take_along_axis(error, largest, 2), 0, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    blockwise = Blockwise(4, 32)
    q = blockwise.quantize(np.zeros((2, 64), np.float32))
    assert not blockwise.dequantize(q, 64).any()
