"""Policies: weighted sums, thresholds, and what is missing."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.policies import PLAIN, WEIGHED, Policy, always, confidence, never, paper
from crayon_runtime.routing.signals import SIGNALS

TWO = Policy("two", {"log_probability": 2.0, "examples_top_k": 1.0}, bias=0.5, threshold=0.25)


def test_a_score_is_a_weighted_sum_and_below_the_threshold_the_server_answers() -> None:
    below = TWO.decide({"log_probability": -0.5, "examples_top_k": 0.7, "prototypes_mean": 9.0})
    assert (below.route, below.threshold) == ("server", 0.25)
    assert below.score == pytest.approx(0.5 - 1.0 + 0.7)
    assert "0.200 is below the threshold 0.250" in below.reason
    assert TWO.decide({"log_probability": -0.5, "examples_top_k": 0.75}).route == "device", "the threshold itself stays"


def test_a_logistic_score_is_a_probability() -> None:
    policy = msgspec.structs.replace(TWO, logistic=True, threshold=0.5)
    for x, route in [(-1.0, "server"), (1.0, "device"), (-5000.0, "server"), (5000.0, "device")]:
        decision = policy.decide({"log_probability": 0.0, "examples_top_k": x - 0.5})
        assert decision.route == route
        assert 0 <= decision.score <= 1
    assert policy.score({"log_probability": 0.0, "examples_top_k": 1.5}) == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("logistic", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_without_a_usable_signal_the_server_answers(bad: float, logistic: bool) -> None:
    policy = msgspec.structs.replace(TWO, logistic=logistic)
    decision = policy.decide({"log_probability": bad, "examples_top_k": 0.0})
    if math.isinf(bad) and logistic:
        assert decision.route == ("server" if bad < 0 else "device")
    else:
        assert (decision.route, decision.reason) == ("server", "no usable signal")
        assert math.isnan(decision.score)


def test_a_signal_that_is_missing_is_named() -> None:
    with pytest.raises(InvalidInput, match="'two' needs the signal examples_top_k") as error:
        TWO.decide({"log_probability": 0.0})
    assert error.value.do


def test_always_and_never_need_no_signal() -> None:
    assert always().decide({}).route == "server"
    assert never().decide({}).route == "device"
    assert "always" in always().decide({}).reason


def test_the_paper_compares_the_mean_cosine_and_confidence_the_log_probability() -> None:
    assert paper(0.4).decide({"prototypes_mean": 0.39}).route == "server"
    assert paper(0.4).decide({"prototypes_mean": 0.41}).route == "device"
    assert confidence().decide({"log_probability": math.log(0.89)}).route == "server"
    assert confidence().decide({"log_probability": math.log(0.91)}).route == "device"


def test_the_tables_agree() -> None:
    assert {name for names in WEIGHED.values() for name in names} <= set(SIGNALS)
    for name, make in PLAIN.items():
        assert make().name == name
        assert tuple(make().weights) == WEIGHED[name]


def test_a_policy_survives_json() -> None:
    policy = msgspec.structs.replace(TWO, after=4, logistic=True)
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": {"entropy": 1.0}}, "'entropy', which there is not"),
        ({"weights": {"log_probability": math.nan}}, "NaN or infinity"),
        ({"threshold": math.inf}, "NaN or infinity"),
        ({"bias": -math.inf}, "NaN or infinity"),
        ({"after": 1}, "from the second token on"),
    ],
)
def test_policies_that_cannot_decide_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        msgspec.structs.replace(TWO, **change)
