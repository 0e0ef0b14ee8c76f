"""How well a score routes: does it tell which answers are wrong, and what does quality cost in calls.

A score says how good the device's answer to a query is: the queries with the lowest scores go to the server. Equal scores are routed
in random order, of which every number here is the expectation.

The performance gap recovered (PGR), its mean over all shares of calls (APGR) and the call-performance threshold (CPT) are those of
RouteLLM (Ong et al., 2024). Where the server is not better than the device there is no gap, and these are None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_runtime.errors import InvalidInput
from crayon_server.evaluate.qa.intervals import RESAMPLES, Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]
    Indices = npt.NDArray[np.int64]

ROUNDING = 1e-9
"""Of an accuracy: less apart is equal."""


class Curve(NamedTuple):
    """What calls buy, one point a threshold; between two points both go in a straight line.

    Attributes:
        calls: float64 [k], share of the queries that go to the server, from 0 to 1.
        accuracy: float64 [k], share of all queries that are answered right then.
    """

    calls: Floats
    accuracy: Floats


def auroc(scores: npt.ArrayLike, positives: npt.ArrayLike) -> float | None:
    """The probability that a positive has a higher score than a negative; a tie counts half (Mann and Whitney, 1947).

    Args:
        scores: float [n], not NaN. To find wrong answers, give the negated score of keeping them.
        positives: bool [n].

    Returns:
        0 to 1; None if all are positives, or none is.
    """
    wins, pairs = _wins(_scores(scores), np.asarray(positives, np.bool_), np.zeros(np.size(scores), np.int64), 1)
    return float(wins.sum() / pairs.sum()) if pairs.sum() else None


def auroc_interval(
    scores: npt.ArrayLike, positives: npt.ArrayLike, groups: Sequence[str], *, seed: int = 0
) -> Estimate | None:
    """`auroc`, and its 95 % interval: the percentile bootstrap over groups, as a user's queries are not independent.

    Args:
        scores, positives: [n]; or [runs, n], also the scores alone, of the same queries: the mean over the runs.
        groups: of each query, who asks.
        seed: of the resampling.
    """
    return _estimate(_resampled(scores, positives, groups, seed))


def auroc_difference(
    scores: npt.ArrayLike, others: npt.ArrayLike, positives: npt.ArrayLike, groups: Sequence[str], *, seed: int = 0
) -> Estimate | None:
    """How much larger the AUROC of `scores` is than that of `others`, both on the same resampled groups. As `auroc_interval`."""
    ours, theirs = (_resampled(both, positives, groups, seed) for both in (scores, others))
    return _estimate(ours - theirs)


def curve(scores: npt.ArrayLike, device: npt.ArrayLike, server: npt.ArrayLike) -> Curve:
    """What all thresholds give.

    Args:
        scores: float [n], not NaN.
        device, server: bool [n], whose answer is right.
    """
    scores = _scores(scores)
    gains = np.asarray(server, np.float64) - np.asarray(device, np.float64)
    if gains.shape != scores.shape:
        raise InvalidInput(f"there are {len(scores)} scores, and answers to {gains.shape} queries", where="scores")
    _, group = np.unique(scores, return_inverse=True)
    sizes, gained = np.bincount(group), np.bincount(group, gains)
    right = float(np.sum(device)) + np.concatenate([[0.0], np.cumsum(gained)])
    calls = np.concatenate([[0.0], np.cumsum(sizes)]) / len(scores)
    return Curve(calls, right / len(scores))


def apgr(scores: npt.ArrayLike, device: npt.ArrayLike, server: npt.ArrayLike) -> float | None:
    """The share of the gap between device and server that is recovered, mean over all shares of calls: random routing has 0.5.

    Arguments as those of `curve`; the integral is that under its straight lines.
    """
    routed = curve(scores, device, server)
    alone, always = routed.accuracy[0], routed.accuracy[-1]
    if always - alone <= ROUNDING:
        return None
    return float((np.trapezoid(routed.accuracy, routed.calls) - alone) / (always - alone))


def call_performance_threshold(
    scores: npt.ArrayLike, device: npt.ArrayLike, server: npt.ArrayLike, share: float
) -> float | None:
    """CPT: the smallest share of calls that recovers a share of the gap. Arguments as those of `curve`."""
    routed = curve(scores, device, server)
    alone, always = routed.accuracy[0], routed.accuracy[-1]
    if always - alone <= ROUNDING:
        return None
    return _calls_for(routed, alone + share * (always - alone))


def calls_saved_at_equal_accuracy(scores: npt.ArrayLike, device: npt.ArrayLike, server: npt.ArrayLike) -> float:
    """The share of calls that need not be made to be right as often as the server is. Arguments as those of `curve`.

    1 where the device alone is right as often.
    """
    routed = curve(scores, device, server)
    return 1.0 - _calls_for(routed, routed.accuracy[-1])


def _calls_for(routed: Curve, accuracy: float) -> float:
    """The smallest share of calls that reaches an accuracy, at most that of the last point."""
    first = int(np.argmax(routed.accuracy >= accuracy - ROUNDING))
    if first == 0:
        return 0.0
    ends = slice(first - 1, first + 1)
    return float(np.interp(accuracy, routed.accuracy[ends], routed.calls[ends]))


def _resampled(scores: npt.ArrayLike, positives: npt.ArrayLike, groups: Sequence[str], seed: int) -> Floats:
    """AUROC, mean over the runs: of all groups, then of each resampling. NaN where one class is missing."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    size = len(names)
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    times = np.concatenate([np.ones((1, size)), drawn])
    runs = np.atleast_2d(_scores(scores))
    of_runs = []
    for run, positive in zip(runs, np.broadcast_to(np.asarray(positives, np.bool_), runs.shape), strict=True):
        wins, pairs = (((times @ pairwise) * times).sum(1) for pairwise in _wins(run, positive, group, size))
        of_runs.append(np.divide(wins, pairs, out=np.full(len(times), np.nan), where=pairs > 0))
    mean: Floats = np.mean(of_runs, axis=0)
    return mean


def _wins(scores: Floats, positives: Bools, group: Indices, size: int) -> tuple[Floats, Floats]:
    """float64 [size, size]: how often a positive of group i has a higher score than a negative of group j; and their pairs."""
    if not len(scores) == len(positives) == len(group):
        raise InvalidInput(f"there are {len(scores)} scores of {len(positives)} queries", where="scores")
    positive, of_positive = scores[positives], group[positives]
    wins = np.empty((size, size))
    for other in range(size):
        negative = np.sort(scores[~positives & (group == other)])
        below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
        wins[:, other] = np.bincount(of_positive, below / 2, minlength=size)
    pairs = np.outer(np.bincount(of_positive, minlength=size), np.bincount(group[~positives], minlength=size))
    return wins, pairs.astype(np.float64)


def _scores(scores: npt.ArrayLike) -> Floats:
    numbers = np.asarray(scores, np.float64)
    if not numbers.size or np.isnan(numbers).any():
        raise InvalidInput("a score is NaN" if numbers.size else "there are no scores", where="scores")
    return numbers


def _estimate(resampled: Floats) -> Estimate | None:
    if np.isnan(resampled[0]):
        return None
    low, high = np.nanquantile(resampled[1:], [0.025, 0.975])
    return Estimate(mean=float(resampled[0]), low=float(low), high=float(high))
