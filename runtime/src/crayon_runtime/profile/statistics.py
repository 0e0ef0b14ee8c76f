"""Whether two profiles differ: a trimmed t-test over processes, with Holm's correction.

Samples of one process are not independent: where its weights happen to lie in memory, and what else the machine did just then, is in
all of them. So the unit is the process, which gives one number, and its logarithm is compared, as what slows a machine down multiplies
times. A rank test cannot do that here: of five processes against five, no order is less likely than 1 in 126, which Holm's correction
over a dozen metrics never lets pass.

Of every five processes the fastest and the slowest are left out (Yuen 1974): one that shared its core with somebody else all the time may be
twice as slow, and would hide any difference.

What is asked is not whether two means are the same, which they never are, but whether they are further apart than `tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

TOLERANCE = 0.02
"""The least difference that is of interest. Our choice: that of timing loops which count as the same."""

_TINY = 1e-300


class Comparison(NamedTuple):
    """Two groups of positive numbers."""

    ratio: float
    """Geometric mean of the second over that of the first, both trimmed."""
    error: float
    """The standard error of its logarithm; infinite if there are too few numbers to tell."""
    degrees: float
    """Of freedom, of that error."""
    p: float
    """Of as large a difference if the ratio was within the tolerance; 1 if there are too few numbers to tell."""

    @property
    def interval(self) -> tuple[float, float]:
        """Where the ratio is: the confidence interval, of 95 % by itself."""
        if not 0 < self.error < math.inf:
            return (0.0, math.inf) if self.error else (self.ratio, self.ratio)
        reach = math.exp(_quantile(0.025, self.degrees) * self.error)
        return self.ratio / reach, self.ratio * reach


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of numbers in ascending order, at least one; between two of them linear, as numpy's default."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def compare_groups(a: Sequence[float], b: Sequence[float], tolerance: float = TOLERANCE) -> Comparison:
    """Yuen's trimmed t-test on the logarithms of two groups of independent positive numbers, for a difference larger than `tolerance`.

    As Student's where the groups are of one size, when it bears that they vary differently (Box 1954), and as Welch's otherwise.

    Args:
        tolerance: a ratio from 1/(1 + tolerance) to 1 + tolerance is no difference.
    """
    means, parts, lengths = zip(*(_trimmed([math.log(value) for value in group]) for group in (a, b)), strict=True)
    difference = means[1] - means[0]
    ratio = math.exp(difference)
    if min(lengths) < 2:
        return Comparison(ratio, math.inf, 1.0, 1.0)
    edge = math.log1p(tolerance)
    error = math.sqrt(sum(parts))
    if error < 1e-12:  # counts that are the same in every process
        return Comparison(ratio, 0.0, 1.0, 0.0 if abs(difference) > edge else 1.0)
    if lengths[0] == lengths[1]:
        degrees = 2.0 * (lengths[0] - 1)
    else:
        own = [part**2 / (length - 1) for part, length in zip(parts, lengths, strict=True)]
        degrees = sum(parts) ** 2 / sum(own)
    p = upper_tail((abs(difference) - edge) / error, degrees) + upper_tail((abs(difference) + edge) / error, degrees)
    return Comparison(ratio, error, degrees, min(p, 1.0))


def _trimmed(values: list[float]) -> tuple[float, float, int]:
    """The mean without a fifth at each end, the square of its standard error from the winsorized variance (infinite for one value), and how many are left."""
    ordered, cut = sorted(values), len(values) // 5
    left = ordered[cut : len(ordered) - cut]
    if len(left) < 2:
        return fmean(left), math.inf, len(left)
    winsorized = [left[0]] * cut + left + [left[-1]] * cut
    return fmean(left), variance(winsorized) * (len(values) - 1) / (len(left) * (len(left) - 1)), len(left)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that of all true hypotheses together one is rejected at .05 in at most 5 % of cases (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = most
    return adjusted


def upper_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution."""
    half = 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return half if t >= 0 else 1 - half


def _quantile(tail: float, degrees: float) -> float:
    """The t whose upper tail is `tail`, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, degrees) > tail else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b): its continued fraction, by Lentz's method (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / _away(1 + term * d), _away(1 + term / c)
            fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * fraction / a


def _away(value: float) -> float:
    """Not zero."""
    return value if abs(value) > _TINY else _TINY
