"""The signals, against their definitions written out."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.examples import ExampleStates
from crayon_runtime.prototypes import Prototypes
from crayon_runtime.routing.signals import SIGNALS, Reference, States, signals
from tests.runtime import pools, tiny

D = 12


def random(*shape: int, seed: int = 0, offset: float = 0.7) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Not around 0, as hidden states are not."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) + offset).astype(np.float32)


def prototypes(count: int = 9) -> Prototypes:
    return Prototypes(random(count, D), random(D, seed=1), "server")


def examples(count: int = 7) -> ExampleStates:
    return ExampleStates(random(count, D, seed=2), random(count, D, seed=3), random(count, seed=4))


def said(**changes: Any) -> States:
    return States(random(D, seed=5), random(D, seed=6), [-0.1, -0.7, -0.01])._replace(**changes)


def cosine(a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def best(values: list[float], k: int = 5) -> float:
    return float(np.mean(sorted(values)[-k:]))


@pytest.mark.parametrize("m, n", [(9, 7), (3, 2), (1, 1), (5, 6)])
@pytest.mark.parametrize("residual", [True, False])
def test_every_signal_is_what_it_says(m: int, n: int, residual: bool) -> None:
    s, own, projection = prototypes(m), examples(n), pools.projection(4, D, 3, residual=residual)
    a, p = said().answer_tap, said().prompt_tap
    assert a is not None
    assert p is not None
    centred = [cosine(a - s.mean, x - s.mean) for x in s.states]
    shift = projection.mean + (projection.answer_mean if projection.answer_mean is not None else 0)
    projected = [cosine((a - shift) @ projection.projection, (x - shift) @ projection.projection) for x in s.states]
    expected = {
        "log_probability": (-0.1 - 0.7 - 0.01) / 3,
        "log_odds": math.log(math.exp(-0.27) / (1 - math.exp(-0.27))),
        "least_log_probability": -0.7,
        "prototypes_mean": np.mean([cosine(a, x) for x in s.states]),
        "prototypes_max": max(centred),
        "prototypes_top_k": best(centred),
        "projected_mean": np.mean(projected),
        "projected_max": max(projected),
        "projected_top_k": best(projected),
        "examples_top_k": best([cosine(a - s.mean, x - s.mean) for x in own.answer]),
        "examples_nearness": -math.log(1.01 - max(cosine(a - s.mean, x - s.mean) for x in own.answer)),
        "prompts_top_k": best([cosine(p, x) for x in own.prompt]),
        "prompts_nearness": -math.log(1.01 - max(cosine(p, x) for x in own.prompt)),
    }
    reference = Reference.of(s, own, projection)
    computed = signals(said(), reference, SIGNALS)
    assert list(computed) == list(SIGNALS)
    assert computed == pytest.approx(expected, abs=1e-5)
    for name in SIGNALS:
        assert signals(said(), reference, [name]) == {name: computed[name]}


def test_examples_without_prototypes_are_compared_as_they_are() -> None:
    computed = signals(said(), Reference.of(None, examples()), ["examples_top_k"])
    a = said().answer_tap
    assert computed["examples_top_k"] == pytest.approx(best([cosine(a, x) for x in examples().answer]), abs=1e-5)


@pytest.mark.parametrize(
    "name, reference, lacks",
    [
        ("prototypes_mean", Reference.of(None, examples()), "came without any"),
        ("projected_max", Reference.of(prototypes(), examples()), "the pool's projection"),
        ("projected_max", Reference.of(None, None, pools.projection(4, D, 3)), "the pool's projection"),
        ("examples_top_k", Reference.of(prototypes(), None), "the user's own examples"),
        ("prompts_top_k", Reference.of(None, None), "the user's own examples"),
        ("entropy", Reference.of(prototypes(), examples()), "no signal 'entropy'"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_what_it_needs(name: str, reference: Reference, lacks: str) -> None:
    with pytest.raises(InvalidInput, match=lacks) as error:
        signals(said(), reference, ["log_probability", name])
    assert error.value.do
    assert name not in reference.names


def test_states_of_different_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different sizes"):
        Reference.of(prototypes(), ExampleStates(random(2, 5), random(2, 5), random(2)))


def test_an_answer_of_which_nothing_was_fed_has_no_usable_signal() -> None:
    computed = signals(
        said(answer_tap=None), Reference.of(prototypes(), examples()), ["log_probability", "prompts_top_k"]
    )
    assert [*map(math.isnan, computed.values())] == [True, True]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["prompt_tap", "answer_tap", "log_probabilities"])
def test_what_is_not_finite_makes_its_signals_nan_and_no_others(field: str, bad: float) -> None:
    values = np.array(getattr(said(), field), np.float32)
    values[1:] = bad
    broken = said(**{field: values.tolist() if field == "log_probabilities" else values})
    computed = signals(broken, Reference.of(prototypes(), examples(), pools.projection(4, D, 3)), SIGNALS)
    of = {
        "prompt_tap": {"prompts_top_k", "prompts_nearness"},
        "answer_tap": {name for name in SIGNALS if name.partition("_")[0] in ("prototypes", "projected", "examples")},
        "log_probabilities": {"log_probability", "log_odds", "least_log_probability"},
    }
    assert {name for name, value in computed.items() if math.isnan(value)} == of[field]


@pytest.mark.filterwarnings("error")
def test_a_huge_state_still_has_a_direction() -> None:
    huge = np.full(D, 3e38, np.float32)
    computed = signals(said(answer_tap=huge), Reference.of(prototypes(), None), ["prototypes_mean"])
    ones = signals(said(answer_tap=np.ones(D, np.float32)), Reference.of(prototypes(), None), ["prototypes_mean"])
    assert computed == pytest.approx(ones)


def test_what_is_certain_or_the_same_has_an_end() -> None:
    own = examples()
    same = States(own.prompt[2], own.answer[2], [0.0, 0.0])
    computed = signals(same, Reference.of(None, own), ["log_odds", "examples_nearness", "prompts_nearness"])
    assert computed["log_odds"] == pytest.approx(math.log(999))
    assert computed["examples_nearness"] == computed["prompts_nearness"] == pytest.approx(math.log(100), abs=1e-3)
    hopeless = signals(said(log_probabilities=[-800.0]), Reference.of(None, None), ["log_odds"])
    assert hopeless["log_odds"] == pytest.approx(-800)


def test_a_state_without_a_direction_is_like_nothing() -> None:
    s = prototypes()
    computed = signals(said(answer_tap=s.mean), Reference.of(s, examples()), ["prototypes_top_k", "examples_top_k"])
    assert [*computed.values()] == [0.0, 0.0]


def test_signals_of_a_running_answer() -> None:
    with tiny.engine(tap_size=D) as engine:
        whole = engine.generate("the alarm", max_new_tokens=4)
        reference = Reference.of(prototypes(), examples())
        names = ["log_probability", "prototypes_mean", "examples_top_k", "prompts_top_k"]
        with engine.stream("the alarm", max_new_tokens=20) as stream:
            assert stream.so_far.answer_tap is None
            for _ in range(4):
                next(stream)
            assert signals(stream.so_far, reference, names) == signals(whole, reference, names)
        assert stream.so_far is stream.generation


def test_computing_signals_keeps_nothing() -> None:
    reference = Reference.of(prototypes(64), examples(10))
    names = ["log_probability", "prototypes_top_k", "examples_top_k"]
    answer = said()
    signals(answer, reference, names)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(100):
        signals(answer, reference, names)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2000
