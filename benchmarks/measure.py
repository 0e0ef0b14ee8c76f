"""Timing on a machine that is not quiet: interleaved, repeated, compared as ratios."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np


def interleaved(runs: dict[str, Callable[[], None]], repetitions: int, *, pause: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call, `repetitions` times, taking turns so that a disturbance hits all alike. One call each warms up.

    Each round begins with another one, so that nobody always comes after the same neighbour.

    Args:
        pause: seconds before each call, where the one before it may have left threads that still spin.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repetition in range(-1, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
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


_START = """
import json, os, sys, time
from pathlib import Path
from crayon_runtime import Engine
started = time.perf_counter()
engine = Engine.load(sys.argv[1], backend=sys.argv[2], threads=int(sys.argv[3]))
loaded = time.perf_counter()
engine.generate([1], max_new_tokens=1)
first = time.perf_counter()
engine.generate([1], max_new_tokens=1)
again = time.perf_counter()
resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(json.dumps([loaded - started, (first - loaded) - (again - first), resident]))
"""


class Start(NamedTuple):
    """A new process."""

    load: float
    """Seconds to load a bundle."""
    init: float
    """Seconds that its first token takes longer than the second."""
    resident: int
    """Bytes of memory after them, with the weights."""


def start(bundle: Path, backend: str, threads: int) -> Start:
    """Load a bundle in a new process, which answers with two tokens. Linux only."""
    command = [sys.executable, "-c", _START, str(bundle), backend, str(threads)]
    return Start(*json.loads(subprocess.check_output(command)))


class Busy:
    """A process that computes without end and without memory, stopped but for the times when it is wanted. Linux only."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.2)  # imports
        self._process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it compute, from a little before the block on."""
        self._process.send_signal(signal.SIGCONT)
        time.sleep(0.1)  # for the scheduler to find it a core
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """What it has computed so far, in steps of a hundredth."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
