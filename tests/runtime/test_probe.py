"""The probe must measure memory: a copy by the C library reads as much, and writes it too."""

from __future__ import annotations

import time

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.probe import read_bandwidth


@pytest.mark.parametrize("nbytes", [1, 1000, 5_000_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_size_and_any_number_of_threads(nbytes: int, threads: int) -> None:
    assert 1e8 < read_bandwidth(nbytes, threads, repetitions=1) < 1e13


def test_reading_is_at_least_as_fast_as_copying() -> None:
    size = 128 << 20
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)

    def copied() -> float:
        start = time.perf_counter()
        np.copyto(target, source)
        return size / (time.perf_counter() - start)

    # Interleaved, and the best of each: other work on the machine only slows either.
    pairs = [(read_bandwidth(size, 1, repetitions=1), copied()) for _ in range(5)]
    read, copy = (max(values) for values in zip(*pairs, strict=True))
    assert read > 0.8 * copy


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (-5, 1)])
def test_counts_that_are_not_positive(arguments: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        read_bandwidth(*arguments)
    with pytest.raises(InvalidInput, match="cannot read"):
        read_bandwidth(1, 1, repetitions=0)
