"""Against scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crayon_runtime.profile.statistics import compare_groups, holm, percentile, upper_tail
from tests.support import needs

scipy_stats = needs.module("scipy.stats")


@pytest.mark.parametrize("degrees", [1.0, 2.5, 8.0, 40.0, 1e4])
@pytest.mark.parametrize("t", [-7.0, -0.3, 0.0, 0.5, 2.0, 9.0, 60.0])
def test_the_tail_of_students_distribution(t: float, degrees: float) -> None:
    assert upper_tail(t, degrees) == pytest.approx(scipy_stats.t.sf(t, degrees), rel=1e-9, abs=1e-200)


@pytest.mark.parametrize("m, n", [(3, 3), (4, 3), (5, 5), (5, 7), (10, 10), (11, 4)])
def test_without_tolerance_it_is_yuens_test(m: int, n: int) -> None:
    random = np.random.default_rng(m)
    for _ in range(10):
        a, b = np.exp(random.normal(0, 0.1, m)), np.exp(random.normal(0.05, 0.2, n))
        left = [size - 2 * (size // 5) for size in (m, n)]
        expected = scipy_stats.ttest_ind(np.log(b), np.log(a), equal_var=left[0] == left[1], trim=0.2)
        found = compare_groups(a.tolist(), b.tolist(), tolerance=0.0)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        means = [scipy_stats.trim_mean(np.log(group), 0.2) for group in (a, b)]
        assert math.log(found.ratio) == pytest.approx(means[1] - means[0])
        assert (means[1] - means[0]) / found.error == pytest.approx(expected.statistic)
        reach = scipy_stats.t.ppf(0.975, expected.df) * found.error
        assert math.log(found.interval[1] / found.ratio) == pytest.approx(reach)


def test_a_process_that_was_disturbed_hides_nothing() -> None:
    a, b = [1.0, 2.1, 1.01, 0.99, 1.0], [1.1, 1.09, 1.1, 1.11, 2.3]
    assert compare_groups(a, b).p < 0.01
    assert compare_groups(a, [*b[:4], 1.1]).ratio == pytest.approx(1.1, rel=0.01)


def test_a_difference_within_the_tolerance_is_none_however_sure_it_is() -> None:
    a = [1.0, 1.0001, 0.9999, 1.0002, 0.9998]
    assert compare_groups(a, [1.01 * x for x in a], 0.0).p < 1e-6
    assert compare_groups(a, [1.01 * x for x in a], 0.02).p > 0.99
    assert compare_groups(a, [1.1 * x for x in a], 0.02).p < 1e-6
    assert compare_groups(a, [x / 1.1 for x in a], 0.02).p < 1e-6


def test_counts_that_never_vary_and_single_ones() -> None:
    assert compare_groups([5.0] * 5, [5.0] * 5).p == 1.0
    never = compare_groups([5.0] * 5, [6.0] * 5)
    assert (never.p, never.interval) == (0.0, (pytest.approx(1.2), pytest.approx(1.2)))
    single = compare_groups([5.0], [9.0] * 5)
    assert (single.p, single.interval) == (1.0, (0.0, math.inf))


def test_holms_correction() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the example in R's p.adjust
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("percent", [0, 50, 90, 99, 100])
@pytest.mark.parametrize("n", [1, 2, 10, 33])
def test_percentiles(n: int, percent: int) -> None:
    values = sorted(np.random.default_rng(n).normal(size=n).tolist())
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
