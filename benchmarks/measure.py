"""Timing on a machine that is not quiet: interleaved, repeated, compared as ratios."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def interleaved(runs: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, `repetitions` times, taking turns so that a disturbance hits all alike. One call each warms up.

    Each round begins with another one, so that nobody always comes after the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repetition in range(-1, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            runs[name]()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speed_ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """How fast `of` is in units of `to`: the median over the rounds of their ratio."""
    return float(np.median(np.array(seconds[to]) / np.array(seconds[of])))


def rate(seconds: list[float], count: int) -> float:
    """Median of `count` things a second."""
    return count / float(np.median(seconds))
