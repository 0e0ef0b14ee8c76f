"""What is found in profiles whose samples are drawn: one in twenty comparisons may report a difference that is none."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.profile import Profile, compare
from crayon_runtime.profile.records import Sample
from tests.runtime.profiles import HEADER, METRICS, drawn

PAIRS = 100


@pytest.mark.parametrize("between", [0.0, 0.03, 0.2])
def test_false_differences_are_rare(between: float) -> None:
    random = np.random.default_rng(1)
    pairs = [compare(drawn(random, between=between), drawn(random, between=between)) for _ in range(PAIRS)]
    false = [len(pair.significant) for pair in pairs]
    assert sum(false) <= 0.05 * PAIRS * len(METRICS)
    assert sum(map(bool, false)) <= 0.08 * PAIRS  # .05, and what 100 draws may be above it


@pytest.mark.parametrize("slower", [1.1, 1 / 1.1])
def test_a_tenth_is_found(slower: float) -> None:
    random = np.random.default_rng(2)
    changed = 0
    for _ in range(PAIRS):
        compared = compare(drawn(random, between=0.013), drawn(random, between=0.013, slower=slower))
        found = {d.metric: d for d in compared.significant}
        changed += "tg32" in found and abs(found["tg32"].compared.ratio / slower - 1) < 0.05
    assert changed >= 0.9 * PAIRS


def test_samples_of_one_process_are_one_number() -> None:
    """A factor of each process, and none of its samples: a test that took samples as independent would be sure of anything."""
    random = np.random.default_rng(3)
    pairs = [
        compare(drawn(random, between=0.1, within=1e-6), drawn(random, between=0.1, within=1e-6)) for _ in range(100)
    ]
    assert sum(len(pair.significant) for pair in pairs) <= 0.05 * 100 * len(METRICS)


def test_a_machine_that_changed_is_said_and_is_no_regression() -> None:
    random = np.random.default_rng(4)
    before, after = drawn(random), drawn(random)
    control = next(test for test in after.tests if test.test == "control_read")
    slow = msgspec.structs.replace(control, samples_ns=[2 * ns for ns in control.samples_ns])
    compared = compare(before, Profile([slow if line is control else line for line in after.lines]))
    assert [d.metric for d in compared.differences if d.significant] == ["control_read"]
    assert compared.significant == []
    assert any("the machine was not the same: control_read" in note for note in compared.notes)


def test_regressions_are_those_beyond_the_limit() -> None:
    random = np.random.default_rng(5)
    compared = compare(
        drawn(random, between=0.001, within=0.001), drawn(random, between=0.001, within=0.001, slower=1.1)
    )
    assert len(compared.regressions(0.05)) == len(METRICS) - 1
    assert compared.regressions(0.15) == []
    faster = compare(drawn(random, between=0.001, within=0.001), drawn(random, between=0.001, within=0.001, slower=0.9))
    assert faster.regressions(0.0) == []
    assert len(faster.significant) == len(METRICS) - 1


def test_memory_is_compared_too() -> None:
    def with_memory(nbytes: int) -> Profile:
        samples = [
            Sample(
                process=i, phase="end", t_ns=1, rss_bytes=nbytes, pss_bytes=None, mapped_bytes=0, peak_rss_bytes=nbytes + i,
                frequency_hz=[], temperature_c={}, throttled={}, energy_j={}, power_w={},
            )
            for i in range(5)
        ]  # fmt: skip
        return Profile([*drawn(np.random.default_rng(6)).lines, *samples])

    compared = compare(with_memory(100_000_000), with_memory(130_000_000))
    (found,) = compared.significant
    assert (found.metric, found.unit, round(found.change, 2)) == ("peak resident memory", "bytes", 0.3)


def test_what_cannot_be_compared() -> None:
    random = np.random.default_rng(7)
    with pytest.raises(InvalidInput, match="no metric in common"):
        compare(drawn(random), Profile([HEADER]))
    with pytest.raises(InvalidInput, match="fewer than 3 repetitions"):
        compare(drawn(random), drawn(random, processes=2))
    other = Profile([msgspec.structs.replace(HEADER, cpu_info="another"), *drawn(random).lines[1:]])
    assert compare(drawn(random), other).notes == ["different processors: c and another"]
    fewer = Profile(drawn(random).lines[:-1])
    assert "not compared, as one of the two has too little of it: control_read" in compare(fewer, drawn(random)).notes
