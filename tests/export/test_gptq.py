"""Judge: Optimal Brain Quantization as its paper defines it, in float64 with torch: an inverse that loses one column at a time."""

from __future__ import annotations

import numpy as np
import pytest

from crayon_export.gptq import DAMPING, compensate, factor, hessian
from crayon_export.quantize import Blockwise
from crayon_export.rounding import Form, least_squares_scales
from crayon_runtime.affine import Affine
from crayon_runtime.errors import CheckpointError
from tests.support import needs

FORMS = [Blockwise(4, 32), Blockwise(8, 64), Blockwise(4, 256), Affine(4, 32), Affine(4, 128), Affine(8, 0)]


def _layer(width: int = 384, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [T, in] that hang together, as those of layers do, and weights [out, in]."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((500, width // 4)) @ rng.standard_normal((width // 4, width))
    inputs = (mixed + rng.standard_normal((500, width))) * rng.uniform(0.2, 3, width)
    return inputs.astype(np.float32), rng.standard_normal((rows, width)).astype(np.float32)


def _obq(form: Form, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The quantized weights, float64 [out, in]; columns in order, a group's scale from the weights when its first column is due."""
    torch = needs.module("torch")
    w, x = torch.tensor(weights, dtype=torch.float64), torch.tensor(inputs, dtype=torch.float64)
    h = 2 * x.T @ x
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    width = w.shape[1]
    group = form.group_size or width
    for i in range(width):
        if i % group == 0:
            scales = least_squares_scales(form, w[:, i : i + group].numpy().astype(np.float32))
        quantized = torch.tensor(form.fake_quantize(w[:, i].numpy().astype(np.float32), scales), dtype=torch.float64)
        error = (w[:, i] - quantized) / inverse[i, i]
        w[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        w[:, i] = quantized
        inverse -= inverse[:, i, None] * inverse[None, i, :] / inverse[i, i]
    return np.asarray(w.numpy())


def _worth(form: Blockwise | Affine, targets: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if isinstance(form, Blockwise):
        return form.dequantize(form.quantize(targets, scales), targets.shape[1])
    return form.dequantize(*form.quantize(targets, scales))


@pytest.mark.parametrize(
    "form, width",
    [*((form, 384) for form in FORMS), *((Blockwise(4, 32), width) for width in (8, 72, 130, 172))],
    ids=str,
)
def test_the_codes_are_those_of_optimal_brain_quantization(form: Blockwise | Affine, width: int) -> None:
    inputs, weights = _layer(width)
    found = compensate(form, weights, factor(hessian(inputs)))
    expected = _obq(form, inputs, weights)
    worth = _worth(form, found.targets, found.scales)
    # Where float32 rounds a weight to the other side, all that follow in its row compensate another error.
    same = (np.abs(worth - expected) <= 1e-4 * np.abs(expected).max()).all(axis=1)
    assert same.mean() >= 0.95
    ours, theirs = (np.linalg.norm(inputs @ (weights - w).T) for w in (worth, expected))
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_outputs_are_nearer_than_those_of_nearest_codes_and_the_error_is_told(form: Blockwise | Affine) -> None:
    inputs, weights = _layer()
    found = compensate(form, weights, factor(hessian(inputs)))
    worth = _worth(form, found.targets, found.scales)
    nearest = _worth(form, weights, form.scales(form.grouped(weights)))
    error, without = (float(np.linalg.norm(inputs @ (weights - w).T)) for w in (worth, nearest))
    assert error < 0.75 * without
    assert found.output_error == pytest.approx(error**2, rel=1e-3)


def test_rows_may_come_in_chunks() -> None:
    inputs, weights = _layer()
    form, factored = Blockwise(4, 32), factor(hessian(inputs))
    whole = compensate(form, weights, factored)
    parts = [compensate(form, weights[i : i + 20], factored) for i in range(0, 64, 20)]
    codes, _ = form.quantize(np.concatenate([p.targets for p in parts]), np.concatenate([p.scales for p in parts]))
    same = (codes == form.quantize(whole.targets, whole.scales).codes).all(axis=(1, 2))
    assert same.mean() >= 0.95
    assert sum(p.output_error for p in parts) == pytest.approx(whole.output_error, rel=0.01)


def test_the_factor_is_that_of_the_damped_matrix() -> None:
    h = hessian(_layer(700)[0])
    r, damping = factor(h.copy())
    assert damping == pytest.approx(DAMPING * float(np.diag(h).mean()))
    upper = np.triu(r).astype(np.float64)
    np.testing.assert_allclose(upper @ upper.T, h + damping * np.eye(700), atol=1e-5 * h.max())


def test_an_input_that_is_always_zero_leaves_its_weights_to_the_nearest_code() -> None:
    inputs, weights = _layer(64)
    inputs[:, 10] = 0
    found = compensate(Blockwise(8, 64), weights, factor(hessian(inputs)))
    np.testing.assert_allclose(found.targets[:, 10], weights[:, 10], atol=1e-5)
    silent = compensate(Blockwise(8, 64), weights, factor(np.zeros((64, 64), np.float32)))
    np.testing.assert_array_equal(silent.targets, weights)


def test_activations_that_overflow_are_refused() -> None:
    h = hessian(_layer(64)[0])
    h[3, 3] = np.inf
    with pytest.raises(CheckpointError, match="overflow"):
        factor(h)
