"""What this machine is and gives: its processor, memory bandwidth, free memory, and the memory that this process took.

Bandwidth is what limits decoding: every token reads every weight once. Its probe is the maximum over int32: vectorized on every platform that numpy knows, without the GIL, and as fast as the C
library's `memchr` over the same bytes, so what it measures is memory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crayon_runtime.errors import InvalidInput

_BUFFER = 1 << 30
"""Bytes. Many times any cache; reading it again and again streams from memory as one longer read would."""

_LEAST = 64 << 20
"""Bytes of one repetition, so that starting the threads does not count."""

_SMALLEST = 1 << 20
"""Bytes of the buffer, so that calling numpy does not count."""


def read_bandwidth(nbytes: int, threads: int, *, repetitions: int = 5) -> float:
    """Bytes per second of a streaming read of `nbytes` by `threads` threads, median of the repetitions.

    It takes as much memory, from 1 MiB to 1 GiB. What fits into a cache is read from there, as the weights of so small a model are.

    Raises:
        InvalidInput: a count that is not positive.
    """
    if min(nbytes, threads, repetitions) < 1:
        raise InvalidInput(f"cannot read {nbytes} bytes with {threads} threads {repetitions} times")
    size = min(max(nbytes, _SMALLEST), _BUFFER)
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    passes = -(-max(nbytes, _LEAST) // size)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(1 + repetitions):
            start = time.perf_counter()
            list(pool.map(_read, parts, [passes] * threads))
            times.append(time.perf_counter() - start)
    return passes * sum(part.nbytes for part in parts) / statistics.median(times[1:])


def processor() -> str:
    """16 hex digits that tell this kind of processor from others: by its name, and by the instructions that it has."""
    told = {platform.machine()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip().lower() in _KINDS:
                told.add(line)
    except OSError:
        pass  # not Linux
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()[:16]


_KINDS = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "cpu implementer", "cpu architecture", "cpu variant", "cpu part", "cpu revision", "features",
)  # fmt: skip
"""Of the lines of /proc/cpuinfo, on x86 and ARM. The others are clocks, addresses and numbers of cores."""


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that new programs get without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def peak_memory() -> int:
    """The most bytes that this process had resident at once.

    Linux counts per program (`VmHWM`); `getrusage`, used elsewhere, would count what the parent process had before it started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(part: npt.NDArray[np.int32], passes: int) -> None:
    for _ in range(passes):
        np.maximum.reduce(part)
