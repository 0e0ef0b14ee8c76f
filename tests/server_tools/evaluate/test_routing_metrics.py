"""Routing metrics: against scikit-learn, against what RouteLLM published, and at the edges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_server.evaluate.routing.metrics import (
    apgr,
    auroc,
    auroc_difference,
    auroc_interval,
    call_performance_threshold,
    calls_saved_at_equal_accuracy,
    curve,
)
from tests.support import ROOT, needs

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def mmlu() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """RouteLLM's results on MMLU: who was right, Mixtral and GPT-4, and the subject of each item."""
    facts = json.loads((ROOT / "tests/data/routing/mmlu_mixtral_gpt4.json").read_text())
    subjects = [name for name, count in facts["subjects"].items() for _ in range(count)]
    small, large = (
        np.unpackbits(np.frombuffer(bytes.fromhex(facts[model]), np.uint8), count=len(subjects)).astype(bool)
        for model in ("small", "large")
    )
    return small, large, subjects


# AUROC


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_that_of_scikit_learn(levels: int) -> None:
    metrics = needs.module("sklearn.metrics")
    for _ in range(20):
        positives = RANDOM.random(200) < 0.3
        scores = RANDOM.integers(0, levels, 200) + positives
        assert auroc(scores, positives) == pytest.approx(metrics.roc_auc_score(positives, scores), abs=1e-12)


def test_auroc_counts_ties_half_and_takes_infinities() -> None:
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auroc([1, 1, 1, 1], [False, True, True, True]) == 0.5
    assert auroc([1, 1, 2], [True, False, False]) == 0.25
    assert auroc([-np.inf, 0.0, np.inf, np.inf], [False, True, True, False]) == pytest.approx(2.5 / 4)


def test_there_is_no_auroc_of_one_class() -> None:
    assert auroc([1, 2], [True, True]) is None
    assert auroc([1, 2], [False, False]) is None
    assert auroc_interval([1, 2], [False, False], ["a", "b"]) is None
    assert auroc_interval([[1, 2], [1, 2]], [[False, True], [True, True]], ["a", "b"]) is None


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(InvalidInput):
        auroc(scores, [True, False][: len(scores)])
    with pytest.raises(InvalidInput):
        curve(scores, [True, False][: len(scores)], [True, False][: len(scores)])


def test_numbers_of_other_queries_are_refused() -> None:
    with pytest.raises(InvalidInput):
        auroc([1, 2, 3], [True, False])
    with pytest.raises(InvalidInput):
        curve([1, 2, 3], [True, False], [True, False])


def test_the_interval_is_that_of_resampled_users() -> None:
    """Against the same bootstrap, written out, with scikit-learn's AUROC."""
    metrics = needs.module("sklearn.metrics")
    users = np.repeat(np.arange(12), 8)
    positives = RANDOM.random(96) < 0.4
    scores = RANDOM.normal(size=96) + positives + RANDOM.normal(size=12)[users]
    found = auroc_interval(scores, positives, [f"user-{u}" for u in users])
    assert found is not None
    written_out = []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(users == u) for u in RANDOM.integers(0, 12, 12)])
        written_out.append(metrics.roc_auc_score(positives[rows], scores[rows]))
    assert found["mean"] == pytest.approx(metrics.roc_auc_score(positives, scores))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(written_out, [0.025, 0.975]), abs=0.02)
    assert found["low"] < found["mean"] < found["high"]


def test_users_that_are_alike_inside_widen_the_interval() -> None:
    of_user = RANDOM.random(20) < 0.5
    positives = of_user.repeat(20)
    scores = positives + RANDOM.normal(size=20).repeat(20)
    by_user = auroc_interval(scores, positives, [str(i // 20) for i in range(400)])
    by_query = auroc_interval(scores, positives, [str(i) for i in range(400)])
    assert by_user is not None
    assert by_query is not None
    assert by_user["high"] - by_user["low"] > 2 * (by_query["high"] - by_query["low"])


def test_the_interval_of_several_runs_is_that_of_their_mean() -> None:
    groups = [str(i // 10) for i in range(200)]
    positives = RANDOM.random((3, 200)) < 0.5
    scores = RANDOM.normal(size=(3, 200)) + positives
    all_runs, first = auroc_interval(scores, positives, groups), auroc_interval(scores[0], positives[0], groups)
    assert all_runs is not None
    assert first is not None
    assert all_runs["mean"] == pytest.approx(np.mean([auroc(*run) for run in zip(scores, positives, strict=True)]))
    assert all_runs["high"] - all_runs["low"] < first["high"] - first["low"]
    assert auroc_interval(scores, positives[0], groups) == auroc_interval(scores, [positives[0]] * 3, groups)


def test_a_difference_is_of_the_same_users() -> None:
    groups = [str(i // 10) for i in range(300)]
    positives = RANDOM.random(300) < 0.5
    scores = positives + RANDOM.normal(size=300)
    better = scores + 0.2 * positives
    none = auroc_difference(scores, 2 * scores + 1, positives, groups)
    assert none is not None
    assert none["low"] == none["mean"] == none["high"] == 0
    found, alone = auroc_difference(better, scores, positives, groups), auroc_interval(scores, positives, groups)
    assert found is not None
    assert alone is not None
    assert found["mean"] == pytest.approx(auroc(better, positives) - auroc(scores, positives))
    assert 0 < found["low"] < found["high"]
    assert found["high"] - found["low"] < alone["high"] - alone["low"]


# What calls buy


def test_a_curve_by_hand() -> None:
    routed = curve([0.1, 0.3, 0.2, 0.3], [False, True, False, False], [True, True, False, True])
    assert routed.calls.tolist() == [0, 0.25, 0.5, 1]
    assert routed.accuracy.tolist() == [0.25, 0.5, 0.5, 0.75]


def test_thresholds_by_hand() -> None:
    scores, device, server = [1, 2, 3, 4], [False, False, True, True], [True, True, True, True]
    assert apgr(scores, device, server) == pytest.approx(0.75)
    assert call_performance_threshold(scores, device, server, 0.5) == 0.25
    assert call_performance_threshold(scores, device, server, 0.75) == pytest.approx(0.375)
    assert calls_saved_at_equal_accuracy(scores, device, server) == 0.5
    assert call_performance_threshold([0] * 4, device, server, 0.3) == pytest.approx(0.3)


def test_a_server_that_is_not_better_leaves_no_gap() -> None:
    device, server = [True, True, False], [True, False, True]
    assert apgr([1, 2, 3], device, server) is None
    assert call_performance_threshold([1, 2, 3], device, server, 0.5) is None
    assert calls_saved_at_equal_accuracy([1, 2, 3], device, server) == 1


def test_equal_scores_are_as_good_as_random_ones(mmlu) -> None:
    small, large, subjects = mmlu
    assert apgr(np.zeros(len(small)), small, large) == pytest.approx(0.5)
    random = [apgr(RANDOM.random(len(small)), small, large) for _ in range(40)]
    assert np.mean(random) == pytest.approx(0.5, abs=0.01)
    assert call_performance_threshold(np.zeros(len(small)), small, large, 0.8) == pytest.approx(0.8)
    interval = auroc_interval(RANDOM.random(len(small)), ~small, subjects)
    assert interval is not None
    assert interval["low"] < 0.5 < interval["high"]


def test_accuracies_that_routellm_published(mmlu) -> None:
    small, large, _ = mmlu
    routed = curve(small.astype(float) - large, small, large)
    assert routed.accuracy[0] == pytest.approx(0.681, abs=5e-4)
    assert routed.accuracy[-1] == pytest.approx(0.806, abs=5e-4)
    assert routed.accuracy.max() == pytest.approx(0.859, abs=5e-4)


def test_the_oracle_is_that_of_routellm(mmlu) -> None:
    """Its `get_optimal_accuracy`: as many calls as there are, first where only the large model is right; none that hurts."""
    small, large, _ = mmlu
    routed = curve(small.astype(float) - large, small, large)
    helped = int((~small & large).sum())
    for share in np.linspace(0, 0.8, 9):
        expected = (small.sum() + min(share * len(small), helped)) / len(small)
        assert np.interp(share, routed.calls, routed.accuracy) == pytest.approx(expected, abs=1e-9)


def test_apgr_is_the_area_of_many_thresholds(mmlu) -> None:
    """Against RouteLLM's way: the accuracy at each of many thresholds, counted out."""
    small, large, _ = mmlu
    scores = RANDOM.normal(size=len(small)) + 0.7 * small
    calls, accuracy = [], []
    for threshold in np.quantile(scores, np.linspace(0, 1, 201)):
        to_large = scores < threshold
        calls.append(to_large.mean())
        accuracy.append(np.where(to_large, large, small).mean())
    gap = large.mean() - small.mean()
    area = float(np.trapezoid((np.array(accuracy) - small.mean()) / gap, calls))
    assert apgr(scores, small, large) == pytest.approx(area, abs=2e-3)
    half = call_performance_threshold(scores, small, large, 0.5)
    assert half == pytest.approx(np.interp(0.5, (np.array(accuracy) - small.mean()) / gap, calls), abs=0.02)
