"""GPTQ: the error of each column that is rounded is made good by those that are not rounded yet (Frantar et al. 2022, arXiv:2210.17323).

With the inputs X [T, in] that a linear layer W [out, in] gets, its output changes by ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), where
H = X^T X (the paper's 2 X X^T; the factor cancels). Columns are rounded from the first to the last, each where the sum is then least.

The paper updates all columns to come, through a Cholesky factor of H^-1. Here H = R R^T with an upper triangular R, and a block of columns
b is updated when its turn comes, by what the columns before it were rounded to: the same numbers (GPTQ is Babai's nearest plane
algorithm; Chen et al. 2025, arXiv:2507.18553) without an inverse, so float32 does, and a 7B model's largest H is all that is in memory.

    W_b + (W - Q)_before R_before,b R_bb^-1           then within the block as in the paper, whose factor of H^-1 has the block R_bb^-1

The scale of a group is found when its first column is due, from the updated weights, as in the paper's code, and has their least squared
error (AutoGPTQ's `mse`, off by default there: without it, the KL of stories260K and nano to the float model is larger by 4 to 12 %). The
order of columns stays as it is, for a group is a run of columns in both backends. A column that is always zero is rounded to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crayon_export.rounding import Form, least_squares_scales
from crayon_runtime.errors import CheckpointError

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
"""Of the mean of the diagonal of H, added to it: the paper's."""

_BLOCK = 128
"""Columns, the paper's; it holds any number of groups, or is one."""

_FEW = 16
"""Columns of a block that are updated one by one: those after them wait for the product of matrices. The smallest group."""


def hessian(inputs: Floats) -> Floats:
    """X^T X, float32 [in, in], of float32 [T, in]."""
    return np.asarray(inputs.T @ inputs)


class Factor(NamedTuple):
    """Of H + damping I = R R^T."""

    r: Floats
    """Upper triangular, float32 [in, in]; below the diagonal blocks it holds other numbers."""
    damping: float


def factor(h: Floats) -> Factor:
    """Factor H, float32 [in, in], in its own memory.

    Raises:
        CheckpointError: H holds NaN or infinity, so activations overflow.
    """
    n = len(h)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean(dtype=np.float64))
    damping = DAMPING * mean or 1.0
    if not np.isfinite(mean):
        raise CheckpointError("activations on the calibration texts overflow float32", do="use --rounding mse")
    diagonal += np.float32(damping)
    for start in range((n - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        here, before = slice(start, start + _BLOCK), slice(0, start)
        h[here, here] = np.linalg.cholesky(h[here, here][::-1, ::-1])[::-1, ::-1]
        h[before, here] = h[before, here] @ np.linalg.inv(h[here, here]).T
        for top in range(0, start, 8 * _BLOCK):  # a strip at a time: only the upper triangle is needed
            rows, right = slice(top, min(top + 8 * _BLOCK, start)), slice(top, start)
            h[rows, right] -= h[rows, here] @ h[right, here].T
    return Factor(h, damping)


class Compensated(NamedTuple):
    """Rows of a matrix for a format to quantize."""

    targets: Floats
    """float32 [n, in], to be rounded to nearest."""
    scales: Floats
    """float32 [n, groups]"""
    output_error: float
    """||X (W - Q)^T||^2 of these rows."""


def compensate(form: Form, weights: Floats, factor: Factor) -> Compensated:
    """What to round to nearest in the place of some rows of a matrix, so that errors are made good.

    Args:
        weights: float32 [n, in].
        factor: of the layer's H.
    """
    r, damping = factor
    n, width = weights.shape
    group = form.group_size or width
    targets = np.ascontiguousarray(weights.T)
    difference = np.zeros_like(targets)
    scales = np.zeros((n, -(-width // group)), np.float32)
    if not form.group_size:
        scales[:, 0] = least_squares_scales(form, weights)
    loss = 0.0  # tr(D (H + damping I) D^T), D = W - Q
    step = max(_BLOCK, form.group_size)
    for start in range(0, width, step):
        stop = min(start + step, width)
        inverse = np.linalg.inv(np.triu(r[start:stop, start:stop]))
        block = targets[start:stop]
        carried = r[:start, start:stop].T @ difference[:start]
        source = block.copy()
        block += inverse.T @ carried
        errors = np.empty_like(block)
        for first in range(0, stop - start, _FEW):
            few = slice(first, min(first + _FEW, stop - start))
            if form.group_size and (start + first) % group == 0:
                scales[:, (start + first) // group] = least_squares_scales(form, block[first : first + group].T)
            scale = np.ascontiguousarray(scales[:, (start + first) // group])
            for j in range(few.start, few.stop):
                quantized = form.fake_quantize(block[j], scale)
                np.subtract(source[j], quantized, out=difference[start + j])
                np.divide(block[j] - quantized, inverse[j, j], out=errors[j])
                block[j + 1 : few.stop] -= inverse[j, j + 1 : few.stop, None] * errors[j]
            block[few.stop :] -= inverse[few, few.stop :].T @ errors[few]
        loss += float(np.vdot(errors, errors))
    loss -= damping * float(np.vdot(difference, difference))
    return Compensated(np.ascontiguousarray(targets.T), scales, max(loss, 0.0))
