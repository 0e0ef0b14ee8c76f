"""Calibration, against scikit-learn and against counting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput, OutputError, SchemaTooNew
from crayon_runtime.examples import ExampleStates
from crayon_runtime.routing.calibration import (
    MARGIN,
    PENALTY,
    Calibration,
    Fit,
    Point,
    fit,
    read_calibration,
    uncalibrated,
    without_labels,
)
from crayon_runtime.routing.policies import EARLY, Policy
from crayon_runtime.routing.signals import Reference, States, odds, signals
from tests.runtime.routing import hybrid
from tests.support import needs

Row = dict[str, float]
SIZE = 8


def answers(n: int = 200, seed: int = 0) -> tuple[list[Row], list[bool]]:
    """Signals of different units, two of which say something of whether an answer is right, and one nothing."""
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.7
    columns = {
        "log_probability": -0.05 - 0.2 * rng.random(n) - 0.3 * ~right * rng.random(n),
        "prototypes_top_k": 0.5 + 0.1 * rng.standard_normal(n),
        "examples_top_k": 0.7 + 0.05 * rng.standard_normal(n) + 0.1 * right,
        "prototypes_mean": 0.2 + 0.05 * rng.standard_normal(n),
        "prompts_top_k": 0.4 + 0.1 * rng.standard_normal(n) + 0.05 * right,
    }
    columns["log_odds"] = np.log(np.exp(columns["log_probability"]) / -np.expm1(columns["log_probability"]))
    for kind in ("examples", "prompts"):
        columns[f"{kind}_nearness"] = -np.log(1.01 - np.minimum(columns[f"{kind}_top_k"], 1))
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*(c.tolist() for c in columns.values()), strict=True)
    ]
    return rows, right.tolist()


def named(made: Fit, name: str) -> Policy:
    (policy,) = (policy for policy in made.policies if policy.name == name)
    return policy


def calls(policy: Policy, rows: list[Row]) -> int:
    return sum(policy.decide(row).route == "server" for row in rows)


def test_calibrated_is_the_logistic_regression_of_scikit_learn() -> None:
    linear = needs.module("sklearn.linear_model")
    rows, right = answers()
    for row, ok in zip(rows, right, strict=True):
        row["prototypes_top_k"] += 0.05 * ok
    policy = named(fit(rows, right, budget=0.2), "calibrated")
    assert len(policy.weights) == 3
    x = np.array([[row[name] for name in policy.weights] for row in rows])
    z = (x - x.mean(0)) / x.std(0)
    theirs = linear.LogisticRegression(C=1 / PENALTY, tol=1e-10, max_iter=1000).fit(z, right).predict_proba(z)[:, 1]
    assert [policy.score(row) for row in rows] == pytest.approx(theirs, abs=1e-6)
    assert policy.logistic


def test_a_signal_that_would_weigh_the_wrong_way_is_left_out() -> None:
    rows, right = answers()
    for row, ok in zip(rows, right, strict=True):
        row["prototypes_top_k"] = 0.5 - 0.1 * ok
    policy = named(fit(rows, right, budget=0.2), "calibrated")
    assert set(policy.weights) == {"log_odds", "examples_nearness"}
    without = [{name: value for name, value in row.items() if name != "prototypes_top_k"} for row in rows]
    assert policy.weights == pytest.approx(named(fit(without, right, budget=0.2), "calibrated").weights)
    backwards = [{"log_odds": float(not ok)} for ok in right]
    assert not named(fit(backwards, right, budget=0.2), "calibrated").logistic, "nothing is left"


@pytest.mark.parametrize("name", ["calibrated", "confidence", "paper", "early"])
@pytest.mark.parametrize("budget", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
def test_a_budget_is_kept_to_the_call(budget: float, name: str) -> None:
    rows, right = answers()
    early, _ = answers(seed=0)
    made = fit(rows, right, budget=budget, early=early)
    assert calls(named(made, name), rows) == int(budget * len(rows))
    assert named(made, name).after == (EARLY if name == "early" else None)
    blind = without_labels(rows, budget=budget, early=early)
    assert calls(named(blind, name), rows) == int(budget * len(rows))


def test_equal_scores_stay_together_within_the_budget() -> None:
    rows: list[Row] = [{"log_probability": -1.0}] * 5 + [{"log_probability": -0.5}] * 5
    assert calls(named(fit(rows, [True] * 10, budget=0.3), "confidence"), rows) == 0
    assert calls(named(fit(rows, [True] * 10, budget=0.7), "confidence"), rows) == 5


def test_a_target_accuracy_costs_as_few_calls_as_it_takes() -> None:
    rows, right = answers()
    policy = named(fit(rows, right, target_accuracy=0.9), "calibrated")
    kept = sorted(range(len(rows)), key=lambda i: policy.score(rows[i]))
    accuracy = [(n + sum(right[i] for i in kept[n:])) / len(rows) for n in range(len(rows) + 1)]
    fewest = next(n for n, a in enumerate(accuracy) if a >= 0.9)
    assert 0 < fewest < len(rows)
    assert calls(policy, rows) == fewest


def test_a_server_that_is_wrong_too_does_not_count_as_right() -> None:
    rows, right = answers()
    server = [i % 4 > 0 for i in range(len(rows))]
    made = fit(rows, right, budget=0.5, server_correct=server)
    assert made.curve[0].accuracy == pytest.approx(np.mean(right))
    assert made.curve[-1].accuracy == pytest.approx(0.75)
    with pytest.raises(InvalidInput, match=r"the accuracy 0\.99 is not reached; the most is 0\.\d+"):
        fit(rows, right, target_accuracy=0.99, server_correct=server)


def test_a_policy_that_misses_the_target_is_left_out_and_no_other() -> None:
    rows, right = answers()
    for row, ok in zip(rows, right, strict=True):
        row["prototypes_mean"] = 0.9 - 0.5 * ok  # the wrong way round: the server gets what the device can
    server = [not ok for ok in right]
    made = fit(rows, right, target_accuracy=0.95, server_correct=server)
    names = {policy.name for policy in made.policies}
    assert "calibrated" in names
    assert "paper" not in names


def test_the_curve_is_what_its_thresholds_do() -> None:
    rows, right = answers(57)
    made = fit(rows, right, budget=0.2)
    policy = named(made, "calibrated")
    assert (made.curve[0].calls, made.curve[-1].calls) == (0, 1)
    for point in made.curve:
        routed = [policy.score(row) < point.threshold for row in rows]
        assert np.mean(routed) == pytest.approx(point.calls)
        assert np.mean([r or ok for r, ok in zip(routed, right, strict=True)]) == pytest.approx(point.accuracy)
    blind = without_labels(rows, budget=0.2)
    assert {point.accuracy for point in blind.curve} == {None}


def test_without_labels_it_is_a_sum_of_known_worth() -> None:
    rows, _ = answers()
    policy = named(without_labels(rows, budget=0.1), "calibrated")
    assert policy.weights == {"log_odds": 1.0, "examples_nearness": 0.5}
    assert (policy.bias, policy.logistic) == (0.0, False)
    assert calls(policy, rows) == round(0.1 * len(rows))


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_say_nothing(label: bool) -> None:
    rows, _ = answers(20)
    policy = named(fit(rows, [label] * 20, budget=0.25), "calibrated")
    assert not policy.logistic
    assert calls(policy, rows) == 5


def test_labels_that_a_signal_separates_are_no_trouble() -> None:
    rows: list[Row] = [{"log_odds": -float(i), "examples_nearness": 0.5} for i in range(20)]
    policy = named(fit(rows, [i < 10 for i in range(20)], budget=0.5), "calibrated")
    assert [policy.decide(row).route for row in rows] == ["device"] * 10 + ["server"] * 10
    assert all(math.isfinite(weight) for weight in policy.weights.values())


def test_answers_without_usable_signals_are_calls_and_nothing_else() -> None:
    rows, right = answers(50)
    for i in range(5):
        rows[i] = dict.fromkeys(rows[i], math.nan)
    made = fit(rows, right, budget=0.3)
    assert calls(named(made, "calibrated"), rows) == 15
    none_left = named(fit(rows, right, budget=0.02), "calibrated")
    assert calls(none_left, rows) == 5, "there is nothing to answer them with"
    with pytest.raises(InvalidInput, match="no answer has usable signals"):
        fit([dict.fromkeys(rows[0], math.nan)] * 3, [True, False, True], budget=0.5)


def test_policies_are_made_of_the_signals_that_there_are() -> None:
    rows, right = answers(50)
    some = [{name: row[name] for name in ("log_probability", "log_odds", "prototypes_top_k")} for row in rows]
    made = fit(some, right, budget=0.2)
    assert {policy.name for policy in made.policies} == {"calibrated", "confidence"}
    assert set(named(made, "calibrated").weights) == {"log_odds", "prototypes_top_k"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": []}, "no answers to calibrate with"),
        ({"budget": None}, "either a budget or a target accuracy"),
        ({"target_accuracy": 0.5}, "either a budget or a target accuracy"),
        ({"budget": 1.5}, r"the budget is 1\.5"),
        ({"budget": -0.1}, r"the budget is -0\.1"),
        ({"budget": math.nan}, "the budget is nan"),
        ({"correct": [True]}, "10 answers, and 1 labels"),
        ({"server_correct": []}, "10 answers, and 0 labels"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], message: str) -> None:
    rows, right = answers(10)
    with pytest.raises(InvalidInput, match=message):
        fit(**{"rows": rows, "correct": right, "budget": 0.2} | change)


# From nothing but the user's own examples.


@pytest.mark.parametrize("with_prototypes", [True, False])
def test_uncalibrated_policies_keep_what_is_like_the_examples(with_prototypes: bool) -> None:
    examples = hybrid.examples(10, SIZE)
    reference = Reference.of(hybrid.prototypes(9, SIZE) if with_prototypes else None, examples)
    policies = {policy.name: policy for policy in uncalibrated(reference, examples)}
    assert set(policies) == {"calibrated", "early"} | ({"paper"} if with_prototypes else set())
    rows = []
    for i in range(10):
        others = ExampleStates(*(np.delete(array, i, 0) for array in vars(examples).values()))
        one = States(examples.prompt[i], examples.answer[i], [float(examples.log_probability[i])])
        names = Reference.of(hybrid.prototypes(9, SIZE), others).names - {"least_log_probability"}
        rows.append(
            signals(
                one,
                Reference.of(hybrid.prototypes(9, SIZE) if with_prototypes else None, others),
                names if with_prototypes else names & reference.names,
            )
        )
    for policy in policies.values():
        scores = [policy.score(row) for row in rows]
        expected = min(scores) if policy.name == "paper" else float(np.median(scores)) - MARGIN
        assert policy.threshold == pytest.approx(expected, abs=1e-4)
        assert policy.decide(dict.fromkeys(policy.weights, -5.0)).route == "server"


def test_one_example_is_enough_to_be_confident_like_it() -> None:
    examples = hybrid.examples(1, SIZE)
    policies = {policy.name: policy for policy in uncalibrated(Reference.of(None, examples), examples)}
    assert set(policies["calibrated"].weights) == {"log_odds"}
    assert policies["calibrated"].decide({"log_odds": odds(float(examples.log_probability[0]))}).route == "device"


def test_examples_that_are_all_the_same_leave_room_for_others() -> None:
    examples = hybrid.examples(10, SIZE)
    same = ExampleStates(*(np.repeat(array[:1], 10, 0) for array in vars(examples).values()))
    policies = {policy.name: policy for policy in uncalibrated(Reference.of(None, same), same)}
    near = {"log_odds": odds(float(same.log_probability[0]) - 0.005), "examples_nearness": -math.log(1.01 - 0.995)}
    assert policies["calibrated"].decide(near).route == "device"


# What is kept.


def made(**changes: Any) -> Calibration:
    rows, right = answers(40)
    found = fit(rows, right, budget=0.25, early=rows)
    fields: dict[str, Any] = {
        "adapter": "a" * 64, "budget": 0.25, "target_accuracy": None, "labelled": True, "n": 40,
        "policies": found.policies, "curve": found.curve,
    }  # fmt: skip
    return Calibration(**fields | changes)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    path = made().write(tmp_path)
    assert read_calibration(tmp_path) == made()
    assert path.name == "routing.json"
    assert made().policy("early") is not None
    assert made().policy("paper") is not None
    assert made().policy("best") is None


def test_a_newer_calibration_is_not_guessed_at(tmp_path: Path) -> None:
    made(schema_version="2.0").write(tmp_path)
    with pytest.raises(SchemaTooNew):
        read_calibration(tmp_path)


def test_a_disk_that_is_full_leaves_the_old_calibration(tmp_path: Path) -> None:
    with needs.tmpfs(64 * 1024) as disk:
        made(n=1).write(disk)
        (disk / "filler").write_bytes(bytes(48 * 1024))
        with pytest.raises(OutputError):
            made(n=2, curve=[Point(0.0, None, 0.0)] * 2000).write(disk)
        kept = read_calibration(disk)
        assert kept is not None
        assert kept.n == 1
