"""Judge: brute force, every scale and every code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from crayon_export.quantize import Blockwise
from crayon_export.rounding import Clipping, nearest
from crayon_runtime.affine import Affine

FORMS = [Blockwise(4, 32), Blockwise(8, 32), Blockwise(4, 64), Affine(4, 32), Affine(4, 64), Affine(8, 0)]


def _weights() -> np.ndarray:
    weights = np.random.default_rng(0).standard_t(5, (6, 192)).astype(np.float32)
    weights[2] = 0
    weights[3, :64] = np.abs(weights[3, :64])
    return weights


def _worth(form: Blockwise | Affine, weights: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    if isinstance(form, Blockwise):
        return form.dequantize(form.quantize(weights, scales), weights.shape[1])
    return form.dequantize(*form.quantize(weights, scales))


def _least(form: Blockwise | Affine, group: np.ndarray) -> float:
    """The smallest squared error of a group in float64, over all scales that are tried and all codes for each weight."""
    half = 1 << (form.bits - 1)
    if isinstance(form, Blockwise):
        own = group[np.abs(group).argmax()] / -half
    else:
        own = np.abs(group).max() / ((2 * half - 1) / 2)
    levels = np.arange(-half, half, dtype=np.float64)
    errors = []
    for step in range(-10, 11):
        scale = np.float32(own) * np.float32(1 + step / 50)
        if isinstance(form, Affine) and form.group_size:
            import torch

            scale = torch.tensor(scale).bfloat16().float().numpy()
        errors.append(((group[:, None] - levels * np.float64(scale)) ** 2).min(axis=1).sum())
    return float(min(errors))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_scale_that_is_tried_and_no_code_has_a_smaller_error(form: Blockwise | Affine) -> None:
    weights = _weights()
    with ThreadPoolExecutor(1) as pool:
        rows, scales = Clipping(pool)(form, weights)
    assert rows is weights
    assert scales is not None
    np.testing.assert_array_equal(scales, form.stored(scales))
    errors = form.grouped((_worth(form, weights, scales) - weights).astype(np.float64) ** 2).sum(axis=2)
    for row, groups in enumerate(form.grouped(weights)):
        for i, group in enumerate(groups):
            assert errors[row, i] == pytest.approx(_least(form, group.astype(np.float64)), rel=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_group_is_at_least_as_near_as_with_the_formats_own_scale(form: Blockwise | Affine) -> None:
    weights = _weights()
    with ThreadPoolExecutor(1) as pool:
        scales = Clipping(pool)(form, weights)[1]
    own, found = (
        form.grouped((_worth(form, weights, s) - weights) ** 2).sum(axis=2) for s in (nearest(form, weights)[1], scales)
    )
    assert (found <= own * (1 + 1e-5)).all()
    assert found.sum() < own.sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fake_quantized_weights_are_those_that_the_codes_stand_for(form: Blockwise | Affine) -> None:
    weights = _weights()
    groups = form.grouped(weights)
    scales = form.scales(groups)
    worth = form.fake_quantize(groups, scales[..., None]).reshape(weights.shape)
    np.testing.assert_array_equal(worth, _worth(form, weights, None))


def test_a_width_that_the_group_does_not_divide() -> None:
    weights = _weights()[:, :72]
    form = Blockwise(4, 32)
    with ThreadPoolExecutor(1) as pool:
        scales = Clipping(pool)(form, weights)[1]
    assert scales is not None
    assert scales.shape == (6, 3)
    assert ((_worth(form, weights, scales) - weights) ** 2).sum() < ((_worth(form, weights, None) - weights) ** 2).sum()
