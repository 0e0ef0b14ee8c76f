"""Searching alpha without gradients: a (1+1) evolution strategy in the space of its logarithms (LoraHub's idea, our choice of search)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_SMALLEST = 0.01
"""Of the largest weight: the search goes on from there where a weight is less, because it would never leave 0. Our choice."""

_STEP = 1.0
_GROW, _SHRINK = 1.5, 1.5**-0.25
"""Rechenberg's one-fifth rule: the step keeps its size when one candidate in five is better."""


def refine(
    log_loss: Callable[[Floats], float], start: Floats, *, evaluations: int = 60, seed: int = 0
) -> tuple[Floats, float]:
    """Improve alpha from a start, which is the first evaluation.

    Every further one is softmax(log(best) + step * normal noise), and replaces the best if its log-loss is lower.

    Args:
        log_loss: of an alpha, float32 [N]; to be made small.
        start: float32 [N], not negative.
        evaluations: how often `log_loss` is called, at least 1.

    Returns:
        The best alpha, and its log-loss: never above that of `start`.

    Raises:
        InvalidInput: the start has negative weights, or there are no evaluations.
    """
    if evaluations < 1:
        raise InvalidInput(f"evaluations is {evaluations}; it must be at least 1", where="evaluations")
    if (start < 0).any():
        raise InvalidInput(
            "alpha has negative weights, which are not searched", where="refine", do="customize without --refine"
        )
    rng = np.random.default_rng(seed)
    best, best_loss, step = start, log_loss(start), _STEP
    center = np.log(np.maximum(start, _SMALLEST * max(float(start.max()), _SMALLEST)))
    for _ in range(evaluations - 1):
        candidate = center + step * rng.standard_normal(len(center))
        candidate -= candidate.max()
        weights = np.exp(candidate)
        alpha = (weights / weights.sum()).astype(np.float32)
        loss = log_loss(alpha)
        if loss < best_loss:
            best, best_loss, center = alpha, loss, np.maximum(candidate, np.log(_SMALLEST))
            step *= _GROW
        else:
            step *= _SHRINK
    return best, best_loss
