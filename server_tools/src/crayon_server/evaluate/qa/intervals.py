"""Means with 95 % confidence intervals: the percentile bootstrap over items (Efron, 1979)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

RESAMPLES = 2000


class Estimate(TypedDict):
    """A mean, and the interval that holds 95 % of the means of resampled items."""

    mean: float
    low: float
    high: float


def estimate(values: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Of numbers, float [n]. For a paired difference give the differences.

    Args:
        seed: of the resampling.
    """
    numbers = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    means = [numbers[generator.integers(0, len(numbers), len(numbers))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean=float(numbers.mean()), low=float(low), high=float(high))
